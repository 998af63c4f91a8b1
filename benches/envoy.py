"""An Envoy pair that does what our agents do: captured connections, HBONE, passthrough, a line and counters for every connection.

Made of the plain client and server that tests talk to (`mesh.testing.envoy`); what is added here costs Envoy the kind of work that it
costs us, and takes away limits that a bench would run into.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.ports import DNS, INBOUND_HBONE, OUTBOUND, PROXY_MARK
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import Config, client_config, server_config

_TYPE: Final = "type.googleapis.com/envoy.extensions"
_EVERYTHING: Final = SocketAddress(parse_ip("0.0.0.0"), OUTBOUND)
_MANY: Final = 1_000_000
_GROUPS: Final = ("X25519MLKEM768", "X25519", "P-256")
"""The groups of key exchange, as our agents offer them."""
_UNUSED: Final = "0.1s"
_SOL_SOCKET, _SO_MARK = 1, 36


def pair(ca: FakeCa, namespace: str, server_ip: str, service: str, logs: Path, *, tunnel_each: bool) -> tuple[Config, Config]:
    """Client and server; the client also answers look-ups of the name ``service``.

    ``tunnel_each``: no two connections share a tunnel, and a new one begins with a full handshake.
    """
    client_id, server_id = (SpiffeId("cluster.local", namespace, account) for account in ("client", "server"))
    peer = SocketAddress(parse_ip(server_ip), INBOUND_HBONE)
    client = client_config(_EVERYTHING, ca.issue(client_id), peer, "%DOWNSTREAM_LOCAL_ADDRESS%", expected=server_id)
    server = server_config([peer], ca.issue(server_id), callers="spiffe://cluster.local/")
    _capture(client, server_ip)
    for name, config in (("client", client), ("server", server)):
        _observe(config, logs / f"envoy-{name}.log")
        _lift_limits(config)
        _offer_groups(config)
    if tunnel_each:
        _share_nothing(client, server)
    client["static_resources"]["listeners"].append(_names(service, server_ip))
    return client, server


def _capture(client: Config, server_ip: str) -> None:
    """What the pod's rules redirect: to the server through a tunnel, to anybody else as it is."""
    resources = client["static_resources"]
    (listener,) = resources["listeners"]
    original = {"@type": f"{_TYPE}.filters.listener.original_dst.v3.OriginalDst"}
    listener["listener_filters"] = [{"name": "original_dst", "typed_config": original}]
    (tunnelled,) = listener["filter_chains"]
    tunnelled["filter_chain_match"] = {"prefix_ranges": [{"address_prefix": server_ip, "prefix_len": 32}]}
    proxy = {"@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "passthrough", "cluster": "passthrough"}
    listener["default_filter_chain"] = {"filters": [{"name": "tcp", "typed_config": proxy}]}
    mark = {"level": _SOL_SOCKET, "name": _SO_MARK, "int_value": PROXY_MARK, "state": "STATE_PREBIND"}
    passthrough = {"name": "passthrough", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "10s"}
    resources["clusters"].append({**passthrough, "upstream_bind_config": {"socket_options": [mark]}})


def _names(service: str, ip: str) -> Config:
    """Look-ups of a name, answered from a table."""
    table = {"virtual_domains": [{"name": service, "endpoint": {"address_list": {"address": [ip]}}, "answer_ttl": "30s"}]}
    names = {
        "@type": f"{_TYPE}.filters.udp.dns_filter.v3.DnsFilterConfig",
        "stat_prefix": "names",
        "server_config": {"inline_dns_table": table},
    }
    return {
        "name": "names",
        "address": {"socket_address": {"protocol": "UDP", "address": "0.0.0.0", "port_value": DNS}},
        "listener_filters": [{"name": "envoy.filters.udp.dns_filter", "typed_config": names}],
    }


def _observe(config: Config, log: Path) -> None:
    """A line in the access log and counters by peer for every connection, as our agents keep them."""
    (listener,) = config["static_resources"]["listeners"]
    for chain in (*listener["filter_chains"], *([listener["default_filter_chain"]] if "default_filter_chain" in listener else [])):
        fields = {
            "start": "%START_TIME%",
            "source": "%DOWNSTREAM_REMOTE_ADDRESS%",
            "source_identity": "%DOWNSTREAM_PEER_URI_SAN%",
            "destination": "%UPSTREAM_HOST%",
            "destination_identity": "%UPSTREAM_PEER_URI_SAN%",
            "sent": "%BYTES_SENT%",
            "received": "%BYTES_RECEIVED%",
            "duration": "%DURATION%",
            "flags": "%RESPONSE_FLAGS%",
        }
        file = {"@type": f"{_TYPE}.access_loggers.file.v3.FileAccessLog", "path": str(log), "log_format": {"json_format": fields}}
        tags = {"source": "%DOWNSTREAM_PEER_URI_SAN%", "destination": "%UPSTREAM_PEER_URI_SAN%", "flags": "%RESPONSE_FLAGS%"}
        counters = [
            {"stat": _stat("connections", tags), "value_fixed": 1},
            {"stat": _stat("sent_bytes", tags), "value_format": "%BYTES_SENT%"},
            {"stat": _stat("received_bytes", tags), "value_format": "%BYTES_RECEIVED%"},
        ]
        stats = {"@type": f"{_TYPE}.access_loggers.stats.v3.Config", "stats_scope": {"prefix": "mesh"}, "counters": counters}
        chain["filters"][0]["typed_config"]["access_log"] = [
            {"name": "file", "typed_config": file},
            {"name": "envoy.access_loggers.stats", "typed_config": stats},
        ]


def _stat(name: str, tags: Mapping[str, str]) -> Config:
    return {"name": name, "tags": [{"name": tag, "value_format": value} for tag, value in tags.items()]}


def _lift_limits(config: Config) -> None:
    """By default a cluster takes 1024 connections and requests, which 10 000 idle connections would run into."""
    for cluster in config["static_resources"]["clusters"]:
        limits = {"max_connections": _MANY, "max_pending_requests": _MANY, "max_requests": _MANY}
        cluster["circuit_breakers"] = {"thresholds": [limits]}


def _offer_groups(config: Config) -> None:
    for owner in _transports(config):
        owner["typed_config"]["common_tls_context"]["tls_params"]["ecdh_curves"] = list(_GROUPS)


def _share_nothing(client: Config, server: Config) -> None:
    (cluster,) = (cluster for cluster in client["static_resources"]["clusters"] if cluster["name"] == "peer")
    (options,) = cluster["typed_extension_protocol_options"].values()
    http2 = options["explicit_http_config"]["http2_protocol_options"]
    options["explicit_http_config"]["http2_protocol_options"] = {**http2, "max_concurrent_streams": 1}
    options["common_http_protocol_options"] = {"idle_timeout": _UNUSED}
    for owner in _transports(client):
        owner["typed_config"]["max_session_keys"] = 0
    for owner in _transports(server):
        owner["typed_config"]["disable_stateless_session_resumption"] = True


def _transports(config: Config) -> list[Config]:
    """The TLS settings of listeners and clusters."""
    resources = config["static_resources"]
    owners = [*(chain for listener in resources["listeners"] for chain in listener.get("filter_chains", ())), *resources["clusters"]]
    return [owner["transport_socket"] for owner in owners if "transport_socket" in owner]
