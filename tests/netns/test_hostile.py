"""What a hostile peer sends to a captured pod is refused with its status, told once in the access log, and costs the mover nothing.

The attacker sits in a pod outside the mesh; where it needs a certificate, it has stolen the lab's CA. Its HTTP/2 is written by hand.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import hpack
import pytest
from hyperframe.frame import DataFrame, PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa, trusting_context
from mesh.testing.lab import Lab, running_lab, wait_until
from mesh.testing.netns import Netns
from mesh.tls.bundle import CertificateBundle
from mesh.wire.frames import PREFACE
from tests.netns.http2_by_hand import FRAMES, Link, frame
from ztunnel_py.mover.pod import SOCKETS_AHEAD

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="entering a lab's namespaces from outside needs root")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
SHOP = {"shop/client", "shop/stranger", "shop/server", "shop/database"}
CALLER = SpiffeId("cluster.local", "outside", "default")
POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: shop}
spec: {action: ALLOW, rules: [{from: [{source: {principals: [cluster.local/ns/nowhere/sa/nobody]}}]}]}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("hostile")) as lab:
        lab.label("shop", "istio.io/dataplane-mode=ambient")
        wait_until(lambda: lab.pods_in_mesh() == SHOP, "every pod of the shop is captured")
        wait_until(lambda: lab.curl("shop/client", "http://server.shop/").returncode == 0, "its traffic flows")
        before = quiet_descriptors(lab)
        yield lab
        # One that each test leaves over would pass for one made ahead, but a hundred do not; a few tunnels of the shop's own are kept.
        kept = Counter(socket=2 * SOCKETS_AHEAD)
        wait_until(lambda: not lab.descriptors("n2") - before - kept, f"descriptors do not pile up (before: {before})")


class Attacker:
    """A pod outside the mesh, with the lab's CA in its hands."""

    def __init__(self, lab: Lab, place: Netns) -> None:
        self.lab = lab
        self.place = place
        self.ca = FakeCa.with_key_of(lab.home / "istiod")
        self.server = lab.pod("shop/server")["ips"]
        self.other = lab.pod("shop/database")["ips"][0]
        self._begun = 0

    def connect(self, port: int = 15008, ip: str | None = None) -> socket.socket:
        return self.place.connect(SocketAddress.parse(f"{ip or self.server[0]}:{port}"))

    def shake_hands(self, bundle: CertificateBundle | None, *, alpn: tuple[str, ...] = ("h2",)) -> ssl.SSLSocket:
        return trusting_context(bundle, alpn=alpn).wrap_socket(self.connect())

    def certificate(self, identity: SpiffeId = CALLER) -> CertificateBundle:
        return self.ca.issue(identity)

    @contextmanager
    def link(self) -> Iterator[Link]:
        """An HTTP/2 connection that is in order so far."""
        with self.shake_hands(self.certificate()) as sock:
            link = Link(sock)
            link.send(PREFACE + SettingsFrame(0).serialize())
            yield link

    def begin(self) -> None:
        """What is logged from now on counts; ports that earlier tests had are used again."""
        self._begun = len(self._log())

    def records(self, name: str) -> list[str]:
        """What node n2's access log says of the connection from ``name``, this pod's end of it."""
        whole = self._log()[self._begun :].split("\n")[:-1]  # the last may be half written
        return [line for line in whole if f"src.addr={name} " in line]

    def _log(self) -> str:
        return (self.lab.home / "logs/ztunnel-n2.log").read_text()


@pytest.fixture(scope="module")
def caller(lab: Lab) -> Iterator[Attacker]:
    with lab.inside("outside/caller") as place:
        yield Attacker(lab, place)


@pytest.fixture
def attacker(lab: Lab, caller: Attacker) -> Iterator[Attacker]:
    """The movers of the attacked node are the same after the test, and hold no more than what a pod may have made ahead."""
    before, movers = quiet_descriptors(lab), lab.agent("n2", "mover")
    caller.begin()
    yield caller
    assert lab.agent("n2", "mover") == movers
    made_ahead = Counter(socket=SOCKETS_AHEAD)
    wait_until(lambda: not lab.descriptors("n2") - before - made_ahead, f"no descriptor is left over (before: {before})")
    log = (lab.home / "logs/ztunnel-n2.log").read_text()
    assert "callback.failed" not in log
    assert "Traceback" not in log


def quiet_descriptors(lab: Lab) -> Counter[str]:
    """As many as there are while nothing is under way but, perhaps, a probe: the most of a few looks."""
    seen = Counter[str]()
    for _ in range(5):
        seen |= lab.descriptors("n2")
        time.sleep(0.05)
    return seen


def logged_once(attacker: Attacker, name: str, *words: str) -> str:
    (line,) = wait_until(lambda: attacker.records(name), f"the connection of {name} is logged")
    for word in words:
        assert word in line
    return line


# --- before there is an identity


def refused(attempt: Callable[[], ssl.SSLSocket]) -> tuple[str, str]:
    """Shake hands and read: our end's name, and how the server refused. TLS 1.3 tells a client only when it reads."""
    sock = attempt()
    with sock:
        name = "{}:{}".format(*sock.getsockname())
        try:
            data = sock.recv(1)
        except (ConnectionError, ssl.SSLError) as exc:
            return name, str(exc)
        assert data == b"", "the server spoke to somebody it can't know"
        return name, "closed"


def test_a_peer_without_a_certificate_is_refused(attacker: Attacker) -> None:
    name, how = refused(lambda: attacker.shake_hands(None))
    assert "CERTIFICATE_REQUIRED" in how.upper()
    logged_once(attacker, name, 'error="tls handshake error: no client certificate"', 'direction="inbound"')


@pytest.mark.parametrize(
    ("certificate", "because"),
    [
        pytest.param(lambda ca: FakeCa().issue(CALLER), "certificate verify failed", id="of a foreign authority"),
        pytest.param(
            lambda ca: ca.issue(SpiffeId("evil.example", "outside", "default")),
            "client identity spiffe://evil.example/ns/outside/sa/default is not of trust domain cluster.local",
            id="of a foreign trust domain",
        ),
        pytest.param(lambda ca: ca.issue(CALLER, timedelta(minutes=-1)), "certificate has expired", id="that has expired"),
        pytest.param(lambda ca: ca.issue(CALLER, uris=("spiffe://cluster.local/default",)), "no SPIFFE identity", id="of another form"),
        pytest.param(lambda ca: ca.issue(CALLER, uris=("https://cluster.local/ns/a/sa/b",)), "no SPIFFE identity", id="without identity"),
    ],
)
def test_a_certificate_is_refused_and_the_log_says_why(
    attacker: Attacker, certificate: Callable[[FakeCa], CertificateBundle], because: str
) -> None:
    name, _ = refused(lambda: attacker.shake_hands(certificate(attacker.ca)))
    line = logged_once(attacker, name, "tls handshake error: ", because)
    assert "src.identity" not in line, "nothing was proved"


def send_all_and_hear(sock: socket.socket, garbage: bytes) -> None:
    """To the end, which may be a reset, also before it is all sent. Raises TimeoutError."""
    try:
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:  # shutdown() says so of a connection that was reset
            raise


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70000), b"\0", PREFACE])
def test_garbage_instead_of_tls_is_refused(attacker: Attacker, garbage: bytes) -> None:
    with attacker.connect() as sock:
        name = "{}:{}".format(*sock.getsockname())
        send_all_and_hear(sock, garbage)
    logged_once(attacker, name, "tls handshake error: ")


def test_a_handshake_that_stalls_is_cut_off(attacker: Attacker) -> None:
    with attacker.connect() as silent, attacker.connect() as begun, attacker.shake_hands(attacker.certificate()) as done:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            trusting_context(None).wrap_bio(incoming, outgoing).do_handshake()
        begun.sendall(outgoing.read()[:100])
        for sock, what in (
            (silent, "tls handshake error: not complete"),
            (begun, "tls handshake error: not complete"),
            (done, "protocol error: no HTTP/2 preface"),
        ):
            try:
                while sock.recv(4096):
                    pass
            except ConnectionError:
                pass
            logged_once(attacker, "{}:{}".format(*sock.getsockname()), f"{what} within 10 s")


def test_peers_that_fail_in_any_way_leave_the_counts_that_movers_share_as_they_were(attacker: Attacker) -> None:
    lab, server = attacker.lab, attacker.server[0]
    before = shared_counts(lab, "n2")
    with ExitStack() as stack:
        socks = [stack.enter_context(attacker.connect()) for _ in range(60)]
        for number, sock in enumerate(socks):
            if number % 3 == 1:
                sock.sendall(b"\x16\x03\x01\xff\xff" + bytes(70000) if number % 2 else PREFACE)
            elif number % 3 == 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for bundle in (None, FakeCa().issue(CALLER)) * 5:
        refused(lambda bundle=bundle: attacker.shake_hands(bundle))  # type: ignore[misc]  # of the loop's variable
    for _ in range(5):
        with attacker.link() as link:
            link.send(link.connect(1, f"{server}:9"), link.connect(3, f"{server}:8080"), link.connect(5, "10.0.0.1:80"))
            assert {link.status(1), link.status(3)} == {"503", "200"}
            assert shared_counts(lab, "n2") != before
    wait_until(lambda: shared_counts(lab, "n2") == before, f"all that ended is gone from {before}, not {shared_counts(lab, 'n2')}")


def shared_counts(lab: Lab, node: str) -> list[int]:
    """Of each mover, how many connections and how many HBONE connections of peers the others think that it has."""
    return list(memoryview((lab.home / f"run/{node}/ztunnel/shares").read_bytes()).cast("q"))


def test_old_versions_and_foreign_protocols_of_tls_are_refused(attacker: Attacker) -> None:
    old = trusting_context(attacker.certificate())
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    http = trusting_context(attacker.certificate(), alpn=("http/1.1",))
    for context, because in ((old, "unsupported protocol"), (http, "no protocol in common: the peer offers http/1.1")):
        sock = attacker.connect()
        name = "{}:{}".format(*sock.getsockname())
        with pytest.raises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(sock).recv(1)
        logged_once(attacker, name, "tls handshake error: ", because)


def test_without_alpn_http2_is_served_and_http1_is_not(attacker: Attacker) -> None:
    with attacker.shake_hands(attacker.certificate(), alpn=()) as sock:
        link = Link(sock)
        link.send(PREFACE + SettingsFrame(0).serialize(), link.connect(1, f"{attacker.server[0]}:8080"))
        assert link.status(1) == "200"
    with attacker.shake_hands(attacker.certificate(), alpn=()) as sock:
        link = Link(sock)
        link.send(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n")
        assert link.end() == 1
        logged_once(attacker, link.name, "protocol error: no HTTP/2 preface")


# --- requests


@pytest.mark.parametrize(
    ("fields", "status", "because"),
    [
        pytest.param(
            ((":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "{server}:8080")),
            "400",
            "expected method CONNECT, got GET",
            id="GET",
        ),
        pytest.param(((":method", "CONNECT"),), "400", "no valid authority pseudo header", id="no authority"),
        pytest.param(((":method", "CONNECT"), (":authority", "")), "400", "no valid authority pseudo header", id="empty authority"),
        pytest.param(
            ((":method", "CONNECT"), (":authority", "user@{server}:8080")), "400", "no valid authority pseudo header", id="user information"
        ),
        pytest.param(((":method", "CONNECT"), (":authority", "{server}")), "400", "no valid authority pseudo header", id="no port"),
        pytest.param(((":method", "CONNECT"), (":authority", "{server}:0")), "400", "no valid authority pseudo header", id="port 0"),
        pytest.param(
            ((":method", "CONNECT"), (":authority", "{server}:8080"), (":path", "/"), (":scheme", "https")),
            "400",
            "malformed request",
            id="CONNECT with a path",
        ),
        pytest.param(
            ((":method", "CONNECT"), (":authority", "{server}:8080"), ("transfer-encoding", "chunked")),
            "400",
            "malformed request",
            id="connection-specific header",
        ),
        pytest.param(((":method", "CONNECT"), (":authority", "{other}:3306")), "400", "ip mismatch: {server} != {other}", id="another pod"),
        pytest.param(
            ((":method", "CONNECT"), (":authority", "127.0.0.1:8080")), "400", "ip mismatch: {server} != 127.0.0.1", id="loopback"
        ),
        pytest.param(
            ((":method", "CONNECT"), (":authority", "database.shop.svc.cluster.local:3306")),
            "503",
            "no service or workload for hostname: database.shop.svc.cluster.local",
            id="a service of others",
        ),
        pytest.param(
            ((":method", "CONNECT"), (":authority", "metadata.example:80")),
            "503",
            "no service or workload for hostname",
            id="a foreign name",
        ),
        pytest.param(
            ((":method", "CONNECT"), (":authority", "server.shop.svc.cluster.local:81")), "503", "cannot resolve port", id="no such port"
        ),
        *(
            pytest.param(
                ((":method", "CONNECT"), (":authority", f"{{server}}:{port}")),
                "503",
                "attempted recursive call to ourselves",
                id=f"port {port}",
            )
            for port in (15001, 15006, 15008)
        ),
        pytest.param(((":method", "CONNECT"), (":authority", "{server}:9")), "503", "connection failed: ", id="closed port"),
    ],
)
def test_a_bad_request_gets_its_status_and_one_record(
    attacker: Attacker, fields: tuple[tuple[str, str], ...], status: str, because: str
) -> None:
    names = {"server": attacker.server[0], "other": attacker.other}
    with attacker.link() as link:
        link.send(link.headers(1, *((name, value.format(**names)) for name, value in fields)))
        assert link.status(1) == status
        logged_once(attacker, link.name, because.format(**names), f'src.identity="{CALLER}"')
        link.send(link.connect(3, f"{attacker.server[0]}:8080"))
        assert link.status(3) == "200", "the connection goes on"


def test_a_bad_request_over_ipv6_is_judged_alike(attacker: Attacker) -> None:
    ip = next(ip for ip in attacker.server if ":" in ip)
    with trusting_context(attacker.certificate()).wrap_socket(attacker.connect(ip=f"[{ip}]")) as sock:
        link = Link(sock)
        link.send(PREFACE + SettingsFrame(0).serialize())
        for stream, (authority, status) in enumerate(
            ((f"[{ip}]:15006", "503"), (f"{attacker.server[0]}:8080", "400"), ("[::1]:8080", "400"), (f"[{ip}]:8080", "200"))
        ):
            link.send(link.connect(2 * stream + 1, authority))
            assert link.status(2 * stream + 1) == status, authority


def test_what_the_peer_claims_in_headers_changes_nothing(attacker: Attacker) -> None:
    lab = attacker.lab
    lab.write("policy.yaml", POLICY.replace("ns/nowhere/sa/nobody", "ns/shop/sa/client"))
    try:
        client = lab.pod("shop/client")["ips"][0]

        def denied() -> bool:
            with attacker.link() as link:
                claims = (
                    ("forwarded", f'for="{client}:4000";host=server.shop.svc.cluster.local'),
                    ("x-forwarded-for", client),
                    ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/client"),
                    ("x-forwarded-network", "elsewhere"),
                    ("baggage", "k8s.namespace.name=shop,k8s.pod.name=client,service.name=client"),
                    ("traceparent", "00-" + "0" * 52),
                )
                link.send(link.headers(1, (":method", "CONNECT"), (":authority", f"{attacker.server[0]}:8080"), *claims))
                status = link.status(1)
                if status == "401":
                    reason = "connection closed due to policy rejection"
                    logged_once(attacker, link.name, reason, f'src.identity="{CALLER}"', 'response_flags="DENY"')
                return status == "401"

        wait_until(denied, "the policy is in force")
    finally:
        lab.remove("policy.yaml")
        wait_until(lambda: lab.curl("outside/caller", "http://server.shop/").returncode == 0, "the policy is gone")


# --- frames


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("with_tunnel", [False, True], ids=["alone", "beside a tunnel"])
def test_a_malformed_frame_ends_the_connection_with_its_code_and_one_record(attacker: Attacker, name: str, with_tunnel: bool) -> None:
    data, code = FRAMES[name]
    if code is None and not with_tunnel:
        data, code = frame(1, 0x4, 1, hpack.Encoder().encode([(":status", "200")])) + frame(0, 0, 7, b"x"), 1
    with attacker.link() as link:
        if with_tunnel:
            link.send(link.connect(1, f"{attacker.server[0]}:7000"))
            assert link.status(1) == "200"
        with suppress(ConnectionError, ssl.SSLError):  # we may be refused before all is sent
            link.send(data)
        if code is None:  # an error of the stream alone
            assert link.status(1).startswith("reset")
            logged_once(attacker, link.name)
            return
        assert link.end() in (code, None), "the last frame may be lost where the connection is cut with bytes unread"
    logged_once(attacker, link.name, "protocol error: ")


def test_data_beyond_the_window_ends_the_stream_alone(attacker: Attacker) -> None:
    with attacker.link() as link:
        link.send(link.connect(1, f"{attacker.server[0]}:7000"), link.connect(3, f"{attacker.server[0]}:7000"))
        assert link.status(1) == "200"
        assert link.status(3) == "200"
        # The echo server's answers are not let through (our window is shut), so it stops reading, and credit ends.
        link.send(frame(4, 0, 0, struct.pack(">HI", 4, 0)))
        block = DataFrame(1, bytes(16384)).serialize()
        link.sock.settimeout(20)
        # Each frame that follows the reset uses up some patience with stale ones, so we look for it before we send the next.
        for _ in range((64 << 20) // 16384):  # far more than the kernel's buffers on the way to the server and back
            link.send(block)
            if any(isinstance(came, RstStreamFrame) and (came.stream_id, came.error_code) == (1, 3) for came in link.arrived()):
                break
        else:
            pytest.fail("credit never ends")
        link.send(WindowUpdateFrame(3, 100).serialize(), DataFrame(3, b"still here").serialize())
        while not isinstance(received := link.receive(), DataFrame):
            assert received is not None
        assert received.data == b"still here"


def test_rapid_reset_is_borne_for_a_while_and_then_refused(attacker: Attacker) -> None:
    with attacker.link() as link:
        try:
            for stream in range(1, 20_001, 2):
                link.send(link.connect(stream, f"{attacker.server[0]}:7000"), RstStreamFrame(stream, 8).serialize())
        except (ConnectionError, ssl.SSLError):
            pass
        assert link.end() in (11, None)
    wait_until(lambda: "protocol error: too much of" in "".join(attacker.records(link.name)), "the end of our patience is logged")


def test_ten_thousand_streams_get_two_hundred_tunnels(attacker: Attacker) -> None:
    with attacker.link() as link:
        requests = [link.connect(stream, f"{attacker.server[0]}:7000") for stream in range(1, 20_001, 2)]
        outcomes = Counter[str]()
        try:
            for start in range(0, len(requests), 100):
                link.send(*requests[start : start + 100])
            while (received := link.receive()) is not None:
                outcomes[type(received).__name__] += 1
        except (ConnectionError, ssl.SSLError):
            pass
    assert outcomes["HeadersFrame"] <= 200
    wait_until(
        lambda: any("too much of requests over the limit of streams" in line for line in attacker.records(link.name)),
        "the end of our patience is logged",
    )


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(lambda link: PingFrame(0, bytes(8)).serialize() * 1000, id="PING"),
        pytest.param(lambda link: SettingsFrame(0).serialize() * 1000, id="SETTINGS"),
        pytest.param(lambda link: frame(0, 0, 1, b"") * 1000, id="empty DATA"),
        pytest.param(lambda link: frame(2, 0, 1, bytes(5)) * 1000, id="PRIORITY"),
        pytest.param(lambda link: frame(0x77, 0, 1, b"") * 1000, id="unknown frames"),
    ],
)
def test_a_flood_that_is_never_read_ends(attacker: Attacker, flood: Callable[[Link], bytes]) -> None:
    with attacker.link() as link:
        link.send(link.connect(1, f"{attacker.server[0]}:7000"))
        assert link.status(1) == "200"
        try:
            for _ in range(1000):
                link.send(flood(link))
        except (ConnectionError, ssl.SSLError, TimeoutError):
            pass
    logged_once(attacker, link.name, "protocol error: too much of")


# --- straight to the agent's ports


@pytest.mark.parametrize("port", [15001, 15006])
@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_the_agents_ports_are_closed_to_callers_from_outside(attacker: Attacker, port: int, family: int) -> None:
    ip = sorted(attacker.server, key=lambda ip: ":" in ip)[family]
    # The reset may come before connect() has looked.
    with attacker.place.run(lambda: socket.socket(socket.AF_INET6 if family else socket.AF_INET)) as sock:
        sock.settimeout(15)
        try:
            sock.connect((ip, port))
            sock.sendall(b"hello")
            assert sock.recv(1) == b""
        except ConnectionError:
            pass
        host, client_port = sock.getsockname()[:2]
        name = f"[{host}]:{client_port}" if family else f"{host}:{client_port}"
    logged_once(attacker, name, "attempted recursive call to ourselves")


@pytest.mark.parametrize("target", ["own address", "loopback", "another pod", "own IPv6 address", "IPv6 loopback", "another pod's IPv6"])
@pytest.mark.parametrize("port", [15001, 15006, 15008])
def test_a_captured_pod_reaches_no_agents_port_and_makes_no_loop(lab: Lab, caller: Attacker, target: str, port: int) -> None:
    def of(name: str, family: int) -> str:
        return str(sorted(lab.pod(name)["ips"], key=lambda ip: ":" in ip)[family])

    ip = {
        "own address": of("shop/client", 0),
        "loopback": "127.0.0.1",
        "another pod": caller.server[0],
        "own IPv6 address": of("shop/client", 1),
        "IPv6 loopback": "::1",
        "another pod's IPv6": of("shop/server", 1),
    }[target]
    before = sum(lab.descriptors("n1").values())
    with lab.inside("shop/client") as place:
        try:
            with place.connect(SocketAddress.parse(f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}")) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
                received = sock.recv(4096)
        except ConnectionError:
            received = b""
    # 15008 speaks TLS: its alert is an answer, and all there is.
    assert received == b"" or (port == 15008 and received[:1] == b"\x15")
    wait_until(lambda: sum(lab.descriptors("n1").values()) <= before + 4, "nothing goes round")


# --- the agent's pages and the control plane, which everybody reaches

GARBAGE = (
    b"\0" * 1000,
    b"GET / HTTP/1.1\r\n" + b"x: " + b"a" * 100_000,
    b"GET /" + b"%ff" * 3000 + b" HTTP/1.1\r\n\r\n",
    b"GET //[ HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET /metrics HTTP/1.0\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
    b"HEAD /healthz/ready HTTP/1.1\r\nhost: x\r\n\r\nGET /nothing HTTP/1.1\r\nhost: x\r\n\r\n\xff",
    PREFACE,
)


@pytest.mark.parametrize("port", [15020, 15021])
def test_garbage_on_the_agents_pages_ends_nothing(lab: Lab, caller: Attacker, port: int) -> None:
    node = next(node for node in lab.status()["nodes"] if node["name"] == "n2")["ips"][0]
    brain = lab.agent("n2", "brain")
    for garbage in GARBAGE:
        with caller.connect(port, node) as sock:
            send_all_and_hear(sock, garbage)
    with caller.connect(port, node) as sock:
        sock.sendall(b"GET /healthz/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert sock.recv(12) in (b"HTTP/1.1 200", b"HTTP/1.1 404")
    assert lab.agent("n2", "brain") == brain
    assert "Traceback" not in (lab.home / "logs/ztunnel-n2.log").read_text()


def test_garbage_on_the_control_planes_port_ends_nothing(lab: Lab, caller: Attacker) -> None:
    istiod = [process for process in lab.status()["processes"] if process["name"] == "istiod"]
    address = "10.99.0.2"
    for garbage in GARBAGE:
        with caller.connect(15012, address) as sock:
            send_all_and_hear(sock, garbage)
    call = (
        (":method", "POST"),
        (":scheme", "https"),
        (":path", "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"),
    )
    grpc = ((":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers"))
    for name, (data, _) in FRAMES.items():
        with trusting_context(None).wrap_socket(caller.connect(15012, address)) as sock, suppress(ConnectionError, ssl.SSLError):
            link = Link(sock)
            link.send(PREFACE + SettingsFrame(0).serialize(), link.headers(1, *call, *grpc), data)
            answer = link.status(1, "grpc-status")
            assert answer == "16" or answer.startswith(("reset", "goaway", "closed")), f"a caller without a token gets {answer} ({name})"
    with trusting_context(None).wrap_socket(caller.connect(15012, address)) as sock, suppress(ConnectionError, ssl.SSLError):
        link = Link(sock)
        link.send(PREFACE + SettingsFrame(0).serialize())
        for stream in range(1, 10_001, 2):
            link.send(link.headers(stream, *call, *grpc), RstStreamFrame(stream, 8).serialize())
    now = [process for process in lab.status()["processes"] if process["name"] == "istiod"]
    assert (now[0]["pid"], now[0]["starts"]) == (istiod[0]["pid"], istiod[0]["starts"])
    assert lab.status()["control_plane"] == "ready"
    assert "Traceback" not in (lab.home / "logs/istiod.log").read_text()
