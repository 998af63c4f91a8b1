"""HBONE between our reactor's driver and Envoy, both ways, over loopback: what one writes the other must read.

A server that ends its direction first is tried with Envoy as client only: as server Envoy (1.40) resets the stream then, often before all
was passed on (INTERNAL_ERROR), also towards another Envoy.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.reactor.tcp import socket_address
from mesh.testing import traffic
from mesh.testing.ca import FakeCa
from mesh.testing.envoy import Observed, RunningEnvoy, free_address, running_client, running_server
from mesh.testing.proxies import EgressProxy, IngressProxy, ReactorThread, tcp_listener, wait_until
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import hbone_context
from mesh.tls.peer import verify_client, verify_server

pytestmark = pytest.mark.interop

LOOPBACKS = ("127.0.0.1", "::1")
OURS = SpiffeId("cluster.local", "ours", "proxy")
THEIRS = SpiffeId("cluster.local", "theirs", "envoy")
STRANGER = SpiffeId("cluster.local", "theirs", "stranger")
MANY = 80
"""Below the 100 streams that Envoy allows a connection."""


@pytest.fixture(scope="module")
def ca() -> FakeCa:
    return FakeCa()


@pytest.fixture(scope="module")
def thread() -> Iterator[ReactorThread]:
    with ReactorThread() as running:
        yield running
    assert running.errors == []


@pytest.fixture(params=LOOPBACKS)
def target(request: pytest.FixtureRequest) -> Iterator[SocketAddress]:
    """A traffic server on IPv4 and on IPv6."""
    with traffic.listen(0, request.param) as listener:
        process = multiprocessing.get_context("fork").Process(target=traffic.serve, args=(listener,), daemon=True)
        process.start()
        yield socket_address(listener.getsockname())
        process.terminate()
        process.join()


@pytest.fixture
def observed(tmp_path: Path) -> Observed:
    return Observed(free_address().port, tmp_path / "access.log")


@contextmanager
def our_client(thread: ReactorThread, bundle: CertificateBundle, peer: SocketAddress, authority: str) -> Iterator[EgressProxy]:
    """Our proxy as client of the HBONE server at ``peer``; it takes nobody but `THEIRS` for it."""
    with tcp_listener(SocketAddress(peer.ip, 0)) as listener:
        context = hbone_context(bundle)
        judge = frozenset({THEIRS})
        proxy = thread.call(
            lambda: EgressProxy(thread.reactor, listener, context, peer, authority, lambda der: verify_server(der, judge)),
        )
        yield proxy
        thread.call(proxy.close)


@contextmanager
def our_server(thread: ReactorThread, bundle: CertificateBundle, ip: str) -> Iterator[IngressProxy]:
    """Our proxy as HBONE server; it takes whoever is of its trust domain."""
    with tcp_listener(SocketAddress(parse_ip(ip), 0)) as listener:
        proxy = thread.call(lambda: IngressProxy(thread.reactor, listener, hbone_context(bundle)))
        proxy.judge = lambda der: None if isinstance(verify_client(der, OURS.trust_domain), SpiffeId) else "not of our trust domain"
        yield proxy
        thread.call(proxy.close)


class Way:
    """From a client's socket to the traffic server through one proxy of ours and one Envoy."""

    def __init__(self, entry: SocketAddress, observed: Observed, envoy: RunningEnvoy) -> None:
        self.entry = (str(entry.ip), entry.port)
        self.envoy = envoy
        self._observed = observed

    def stat(self, name: str) -> int:
        """A counter of Envoy's."""
        with urlopen(f"http://127.0.0.1:{self._observed.admin_port}/stats?format=json&filter=^{name}$", timeout=10) as answer:
            stats = json.load(answer)["stats"]
        return int(stats[0]["value"]) if stats else 0

    def records(self) -> list[dict[str, str]]:
        """Envoy's access log, once it has something."""
        log = self._observed.access_log
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"), "Envoy's access log (written every second)")
        return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def to_envoy(ca: FakeCa, thread: ReactorThread, target: SocketAddress, observed: Observed) -> Iterator[Way]:
    """Envoy is the server of our client."""
    with (
        running_server(ca.issue(THEIRS), str(target.ip), observed) as envoy,
        our_client(thread, ca.issue(OURS), envoy.address, str(target)) as client,
    ):
        yield Way(client.address, observed, envoy)


@pytest.fixture
def from_envoy(ca: FakeCa, thread: ReactorThread, target: SocketAddress, observed: Observed) -> Iterator[Way]:
    """Envoy is the client of our server."""
    with (
        our_server(thread, ca.issue(OURS), str(target.ip)) as server,
        running_client(ca.issue(THEIRS), server.address, str(target), OURS, observed) as envoy,
    ):
        yield Way(envoy.address, observed, envoy)


@pytest.fixture(params=["to_envoy", "from_envoy"])
def way(request: pytest.FixtureRequest, target: SocketAddress) -> Way:
    """Both ways, each over IPv4 and IPv6."""
    found: Way = request.getfixturevalue(request.param)
    return found


def test_megabytes_arrive_unchanged_in_both_directions_at_once(way: Way) -> None:
    seen = traffic.echo(*way.entry, blocks=16)
    assert seen["received"] == seen["sent"]


def test_the_client_may_end_its_direction_while_the_server_answers(way: Way) -> None:
    assert traffic.endfirst(*way.entry, blocks=3) == {"same": True}


def test_the_server_may_end_its_direction_while_the_client_sends(from_envoy: Way) -> None:
    assert traffic.endlast(*from_envoy.entry, blocks=3) == {"same": True}


def test_what_a_server_sends_before_it_ends_is_not_lost(from_envoy: Way) -> None:
    assert traffic.noise(*from_envoy.entry, blocks=8) == {"same": True}


def test_many_tunnels_share_one_connection_with_envoy_as_server(to_envoy: Way) -> None:
    assert traffic.many(*to_envoy.entry, MANY, 50_000) == {"echoed": MANY}
    assert to_envoy.stat("http.hbone.downstream_rq_total") == MANY
    assert to_envoy.stat("http.hbone.downstream_cx_http2_total") == 1


def test_many_tunnels_share_one_connection_with_envoy_as_client(from_envoy: Way) -> None:
    assert traffic.many(*from_envoy.entry, MANY, 50_000) == {"echoed": MANY}
    assert from_envoy.stat("cluster.peer.upstream_rq_total") == MANY
    assert from_envoy.stat("cluster.peer.upstream_cx_total") == 1


def test_envoy_reads_our_certificate_and_authority(to_envoy: Way, target: SocketAddress) -> None:
    assert traffic.attempt(*to_envoy.entry) == {"outcome": "echo"}
    record = to_envoy.records()[0]
    assert (record[":authority"], record["peer"], record["status"]) == (str(target), str(OURS), 200)


@pytest.mark.parametrize("ip", LOOPBACKS)
def test_a_server_that_speaks_first_is_heard_through_either(ca: FakeCa, thread: ReactorThread, ip: str) -> None:
    with traffic.listen(0, ip) as listener:
        target = socket_address(listener.getsockname())
        with (
            running_server(ca.issue(THEIRS), ip) as envoy,
            our_client(thread, ca.issue(OURS), envoy.address, str(target)) as client,
            our_server(thread, ca.issue(OURS), ip) as server,
            running_client(ca.issue(THEIRS), server.address, str(target), OURS) as envoy_client,
        ):
            for entry in (client.address, envoy_client.address):
                with socket.create_connection((ip, entry.port), timeout=10) as sock:
                    accepted, _ = listener.accept()
                    with accepted:
                        accepted.sendall(b"welcome")
                        assert sock.recv(100) == b"welcome"


def test_we_refuse_an_envoy_that_is_not_whom_we_dialled(ca: FakeCa, thread: ReactorThread, target: SocketAddress) -> None:
    with (
        running_server(ca.issue(STRANGER), str(target.ip)) as envoy,
        our_client(thread, ca.issue(OURS), envoy.address, str(target)) as client,
    ):
        assert traffic.attempt(str(client.address.ip), client.address.port)["outcome"] in ("closed", "ConnectionResetError")
        assert client.failures
        assert str(STRANGER) in str(client.failures[0])


@pytest.mark.parametrize("foreign_root", [False, True], ids=["wrong identity", "foreign root"])
def test_envoy_refuses_us_when_we_are_not_whom_it_dialled(
    ca: FakeCa, thread: ReactorThread, target: SocketAddress, observed: Observed, foreign_root: bool
) -> None:
    shown = FakeCa().issue(OURS) if foreign_root else ca.issue(STRANGER)
    with (
        our_server(thread, shown, str(target.ip)) as server,
        running_client(ca.issue(THEIRS), server.address, str(target), OURS, observed) as envoy,
    ):
        way = Way(envoy.address, observed, envoy)
        assert traffic.attempt(*way.entry)["outcome"] in ("closed", "ConnectionResetError")
        assert way.stat("cluster.peer.ssl.fail_verify_error" if foreign_root else "cluster.peer.ssl.fail_verify_san") > 0
        assert server.results == []


def test_we_refuse_an_envoy_with_a_certificate_of_a_foreign_root(ca: FakeCa, thread: ReactorThread, target: SocketAddress) -> None:
    foreign = FakeCa()
    shown = CertificateBundle.parse(key_pem=(bundle := foreign.issue(THEIRS)).key_pem, chain_pem=bundle.chain_pem, roots_pem=ca.root_pem)
    with (
        our_server(thread, ca.issue(OURS), str(target.ip)) as server,
        running_client(shown, server.address, str(target), OURS) as envoy,
    ):
        assert traffic.attempt(str(envoy.address.ip), envoy.address.port)["outcome"] in ("closed", "ConnectionResetError")
        wait_until(lambda: len(server.closed) > 0, "our server's refusal")
        assert "certificate" in str(server.closed[0])
        assert server.results == []


def test_envoy_refuses_us_with_a_certificate_of_a_foreign_root(
    ca: FakeCa, thread: ReactorThread, target: SocketAddress, observed: Observed
) -> None:
    bundle = FakeCa().issue(OURS)
    shown = CertificateBundle.parse(key_pem=bundle.key_pem, chain_pem=bundle.chain_pem, roots_pem=ca.root_pem)
    with (
        running_server(ca.issue(THEIRS), str(target.ip), observed) as envoy,
        our_client(thread, shown, envoy.address, str(target)) as client,
    ):
        assert traffic.attempt(str(client.address.ip), client.address.port)["outcome"] in ("closed", "ConnectionResetError")
        assert Way(client.address, observed, envoy).stat("http.hbone.downstream_rq_total") == 0


# --- nghttp, of nghttp2: an HTTP/2 client of its own


@pytest.fixture
def nghttp(ca: FakeCa, thread: ReactorThread, tmp_path: Path) -> Iterator[Nghttp]:
    with our_server(thread, ca.issue(OURS), "127.0.0.1") as server:
        yield Nghttp(ca.issue(THEIRS), server, tmp_path)


class Nghttp:
    """Runs ``nghttp`` against a server of ours."""

    def __init__(self, bundle: CertificateBundle, server: IngressProxy, directory: Path) -> None:
        self.server = server
        certificate, key = directory / "cert.pem", directory / "key.pem"
        certificate.write_bytes(b"".join(bundle.chain_pem))
        key.write_bytes(bundle.key_pem)
        self._certificate = (f"--cert={certificate}", f"--key={key}")

    def run(self, *, certificate: bool = True) -> str:
        """A GET; all that nghttp has to say about it."""
        command = ["nghttp", "-v", "-n", *(self._certificate if certificate else ()), f"https://{self.server.address}/"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout + done.stderr


def test_nghttp_is_told_that_only_connect_is_served(nghttp: Nghttp) -> None:
    assert ":status: 400" in nghttp.run()


def test_nghttp_reads_our_settings_and_an_orderly_end(nghttp: Nghttp) -> None:
    seen = nghttp.run()
    for setting in ("SETTINGS_INITIAL_WINDOW_SIZE(0x04):4194304", "SETTINGS_MAX_FRAME_SIZE(0x05):1048576"):
        assert setting in seen
    assert "[ERROR]" not in seen
    wait_until(lambda: nghttp.server.closed == [None], f"an orderly end: {nghttp.server.closed}")


def test_nghttp_is_not_served_without_a_certificate(nghttp: Nghttp) -> None:
    assert ":status:" not in nghttp.run(certificate=False)
    wait_until(lambda: len(nghttp.server.closed) > 0, "the refusal")
    assert "certificate" in str(nghttp.server.closed[0])
