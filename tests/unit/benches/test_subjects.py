"""The configurations of the proxies that ours is compared with."""

from __future__ import annotations

from pathlib import Path

from benches import envoy, ztunnel
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
