"""The configurations of the proxies that ours is compared with."""

from __future__ import annotations

from pathlib import Path

from benches import envoy, ztunnel
from benches.envoy_waypoint import Issuer, Rule, waypoint_config
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import Config


def _networks(config: Config) -> list[Config]:
    listener, *_ = config["static_resources"]["listeners"]
    chains = [*listener["filter_chains"], *([listener["default_filter_chain"]] if "default_filter_chain" in listener else [])]
    return [chain["filters"][0]["typed_config"] for chain in chains]


def test_both_envoys_log_and_count_every_connection() -> None:
    for config in envoy.pair(FakeCa(), "envoy", "10.0.0.2", "web.shop.svc", Path("/tmp"), tunnel_each=False):
        for network in _networks(config):
            file, stats = network["access_log"]
            assert file["typed_config"]["path"].startswith("/tmp/envoy-")
            assert len(stats["typed_config"]["counters"]) == 3


def test_tunnels_are_shared_only_where_they_may_be() -> None:
    for each in (False, True):
        client, _ = envoy.pair(FakeCa(), "envoy", "10.0.0.2", "web.shop.svc", Path("/tmp"), tunnel_each=each)
        (options,) = client["static_resources"]["clusters"][0]["typed_extension_protocol_options"].values()
        assert ("max_concurrent_streams" in options["explicit_http_config"]["http2_protocol_options"]) is each
        told = ztunnel.environment("ztunnel", "client", "n1", "", tunnel_each=each)
        assert ("POOL_MAX_STREAMS_PER_CONNECTION" in told) is each


def test_only_the_client_answers_for_names() -> None:
    client, server = envoy.pair(FakeCa(), "envoy", "10.0.0.2", "web.shop.svc", Path("/tmp"), tunnel_each=False)
    assert [len(config["static_resources"]["listeners"]) for config in (client, server)] == [2, 1]


def test_envoy_as_waypoint_judges_and_routes_by_every_rule_and_logs_and_counts() -> None:
    ca = FakeCa()
    rules = [Rule(f"/{name}/", name, SpiffeId("cluster.local", "bench", name)) for name in ("a", "b")]
    bundle = ca.issue(SpiffeId("cluster.local", "bench", "waypoint"))
    config = waypoint_config(bundle, SocketAddress(parse_ip("10.0.0.2"), 80), rules, rules[:1], Issuer("https://issuer.test", "{}"))
    listeners = {listener["name"]: listener for listener in config["static_resources"]["listeners"]}
    manager = listeners["inner"]["filter_chains"][0]["filters"][0]["typed_config"]
    assert len(manager["access_log"]) == 2
    matches = [route["match"] for route in manager["route_config"]["virtual_hosts"][0]["routes"]]
    assert [match["prefix"] for match in matches] == ["/a/", "/b/", "/"]
    tokens, rbac, _ = (each["typed_config"] for each in manager["http_filters"])
    assert tokens["providers"]["https://issuer.test"]["local_jwks"] == {"inline_string": "{}"}
    ((_, policy),) = rbac["rules"]["policies"].items()
    assert policy["principals"][0]["filter_state"]["string_match"] == {"exact": "spiffe://cluster.local/ns/bench/sa/a"}
    assert "address" not in listeners["onward"]
