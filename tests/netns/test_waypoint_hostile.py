"""Ends that mean ill, before, behind and beside a waypoint of its own process: they get a clean refusal or a reset, and nothing else
changes. Its memory stays where it was, it is the same process, no application sees what a policy refuses, and a neighbour is served all the
time (`unharmed`).

What each of these attacks comes to byte by byte is tested within one process (`tests/unit/waypoint_py`); key sets served by somebody who
means ill are in `test_waypoint_keys`.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path

import pytest
from hyperframe.frame import RstStreamFrame, SettingsFrame

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.testing.ca import FakeCa, trusting_context
from mesh.testing.lab import Lab, wait_until
from mesh.testing.netns import Netns
from mesh.testing.waypoints import CLIENT, STRANGER, denial, running_shop, service
from mesh.wire.frames import PREFACE
from tests.netns.http2_by_hand import FRAMES, Link, frame
from tests.unit.mesh.http.test_smuggling import ACCEPTED, BODIES, CHUNKED, HEADS, SMUGGLED, get, post
from tests.unit.waypoint_py.test_hostile_http2 import FLOODS, SETTINGS

pytestmark = [pytest.mark.netns, pytest.mark.skipif(os.geteuid() != 0, reason="entering a lab's namespaces from outside needs root")]

WAYPOINT = "shop/waypoint-0"
ILL = """\
apiVersion: v1
kind: Pod
metadata: {name: ill, namespace: shop, labels: {app: ill}}
spec:
  nodeName: n2
  serviceAccountName: server
  containers: [{name: app, command: [python3, apps/hostile_app.py, "9000"], readinessProbe: {tcpSocket: {port: 9000}}}]
"""
FILES = ILL + service("ill", "app: ill", 9000) + denial("closed", "paths: [/smuggled*]", "web")
GROWTH = 256 << 20
"""Bytes above what a waypoint holds before all of this that it may ever hold; 160 MiB have been seen. Most of it is what nobody reads: 32
MiB and a connection's window in the HBONE connection of the client's node and as much in that of the application's, a MiB of each upload,
to be sent again, and what waits between the two (`docs/reference/waypoint.md`, Bounds). Who sends would go on for ever."""
MANY = 60
"""Connections of one attack."""


class Attacked:
    """The lab as these tests see it, past `meshctl`: sockets of this very process in pods, files and /proc of this machine."""

    def __init__(self, lab: Lab, stranger: Netns, client: Netns, outside: Netns) -> None:
        self.lab = lab
        self.stranger = stranger
        self.client = client
        self.outside = outside
        self.neighbour = Neighbour(client, self.service("web-v1"))  # whose pod stays
        self.pod_ips = {f"{each['namespace']}/{each['name']}": each["ips"] for each in lab.status()["pods"]}
        ca = FakeCa.with_key_of(lab.home / "istiod")
        self.stolen = trusting_context(ca.issue(SpiffeId("cluster.local", "shop", "client")))
        self.before = self.memory("VmRSS")

    @cached_property
    def services(self) -> dict[str, list[str]]:
        return {each["name"]: each["ips"] for each in self.lab.status()["services"] if each["namespace"] == "shop"}

    def service(self, name: str, family: int = 4) -> SocketAddress:
        return SocketAddress.parse(f"{_of(self.services[name], family)}:80")

    def pod(self, name: str, port: int, family: int = 4) -> SocketAddress:
        return SocketAddress.parse(f"{_of(self.pod_ips[name], family)}:{port}")

    def connect(self, service: str = "web", family: int = 4) -> socket.socket:
        """From a captured pod that attacks; its agent carries the bytes to the waypoint. Those that nobody takes may be all that its
        connection there has room for, in the end: what comes after them is asked by others."""
        return self.stranger.connect(self.service(service, family))

    def link(self, family: int = 4) -> Link:
        """HBONE to the waypoint itself, by a pod outside the mesh which has the lab's authority in its hands."""
        sock = self.outside.connect(self.pod(WAYPOINT, 15008, family))
        link = Link(self.stolen.wrap_socket(sock))
        link.send(PREFACE + SettingsFrame(0).serialize())
        return link

    def get(self, path: str, service: str = "web") -> tuple[int, bytes]:
        """An answer's status and body for a client who means well; status 0: none."""
        with self.client.connect(self.service(service)) as sock:
            sock.sendall(get(path.encode(), b"Connection: close"))
            heard = _read(sock)
        head, _, body = heard.partition(b"\r\n\r\n")
        return int(head[9:12] or 0), body

    # What is the same after all of it

    @cached_property
    def pid(self) -> int:
        """Of the waypoint."""
        home = f"{self.lab.home}/".encode()
        for process in Path("/proc").iterdir():
            with suppress(OSError):
                environment = (process / "environ").read_bytes() if process.name.isdecimal() else b""
                if b"\0POD_NAME=waypoint-0\0" in b"\0" + environment and home in environment:
                    return int(process.name)
        raise AssertionError("there is no waypoint")

    def memory(self, line: str) -> int:
        """In bytes, from ``/proc/PID/status``: it fails if the process is another one by now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition(f"{line}:")[2].split()[0]) << 10

    def log_of(self, *processes: str) -> str:
        return "".join((self.lab.home / f"logs/{process}.log").read_text() for process in processes)


def _of(ips: list[str], family: int) -> str:
    ip = next(ip for ip in ips if (":" in ip) == (family == 6))
    return f"[{ip}]" if family == 6 else ip


def _read(sock: socket.socket, until: bytes = b"") -> bytes:
    """All that comes until the connection ends, in whatever manner, or until these bytes have come."""
    heard = b""
    with suppress(ConnectionError):
        while (data := sock.recv(65536)) and not (until and until in heard + data):
            heard += data
        heard += data
    return heard


def statuses(sock: socket.socket, until: bytes = b"") -> list[int]:
    """Of all answers."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", _read(sock, until))]


class Neighbour(threading.Thread):
    """A client who means well, on the same node: asks again and again, each time on a new connection."""

    def __init__(self, place: Netns, server: SocketAddress) -> None:
        super().__init__(daemon=True)
        self.answers: Counter[str] = Counter()
        self._place = place
        self._server = server
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.05):
            try:
                with self._place.connect(self._server) as sock:
                    sock.sendall(get(b"/neighbour", b"Connection: close"))
                    self.answers[_read(sock)[:12].decode()] += 1
            except OSError as exc:
                self.answers[str(exc)] += 1

    def stop(self) -> None:
        self._over.set()
        self.join()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with (
        running_shop(tmp_path_factory.mktemp("waypointhostile"), programs=("hostile_app.py",), hostile=FILES) as lab,
        lab.inside(STRANGER) as stranger,
        lab.inside(CLIENT) as client,
        lab.inside("outside/caller") as outside,
    ):
        attacked = Attacked(lab, stranger, client, outside)
        wait_until(lambda: attacked.get("/smuggled")[0] == 403, "the policy is in force")
        wait_until(lambda: attacked.get("/two-lengths", "ill")[0] == 502, "the hostile application is there")
        attacked.neighbour.start()
        yield attacked
        attacked.neighbour.stop()


@pytest.fixture(autouse=True)
def unharmed(attacked: Attacked) -> Iterator[None]:
    """What holds after each of these tests."""
    attacked.neighbour.answers.clear()
    yield
    wait_until(lambda: attacked.neighbour.answers, "the neighbour is served")
    assert {*attacked.neighbour.answers} == {"HTTP/1.1 200"}, attacked.neighbour.answers
    log = attacked.log_of("shop_waypoint-0_istio-proxy")
    assert "Traceback" not in log
    assert "callback.failed" not in log
    assert '"path": "/smuggled' not in attacked.log_of("shop_web-v1_web", "shop_web-v2_web")
    assert attacked.memory("VmHWM") - attacked.before < GROWTH


# Before it, HTTP/1.1


@pytest.mark.parametrize("family", [4, 6])
def test_what_can_be_read_in_two_ways_is_refused_and_what_follows_it_is_not_read(attacked: Attacked, family: int) -> None:
    found: dict[str, list[int]] = {}
    for name, raw, _ in HEADS:
        with attacked.connect(family=family) as sock:
            with suppress(ConnectionError):
                sock.sendall(raw + SMUGGLED)
            found[name] = statuses(sock)
    # A request is refused with its bytes unread: the reset that follows may take the answer with it on its way through two agents.
    assert {name: got for name, got in found.items() if got and got != [STATUS[name]]} == {}
    assert len([got for got in found.values() if not got]) < len(HEADS) // 4


STATUS = {name: status for name, _, status in HEADS}


def test_a_body_whose_end_is_in_doubt_ends_nothing_and_hides_nothing(attacked: Attacked) -> None:
    for name, body in BODIES:
        with attacked.connect() as sock:
            with suppress(ConnectionError):
                sock.sendall(post(CHUNKED, body=body) + SMUGGLED)
            assert statuses(sock) in ([400], []), name


def test_what_follows_a_request_on_its_connection_is_judged_as_that_was(attacked: Attacked) -> None:
    for name, raw, _ in ACCEPTED:
        with attacked.connect() as sock:
            sock.sendall(raw + SMUGGLED)
            assert statuses(sock, until=b"RBAC: access denied")[-1] == 403, name


PATHS = {
    b"/smuggled%00": 400,
    b"/\0smuggled": 400,
    b"/smuggled\xff": 400,
    b"/\xc0\xae\xc0\xae/smuggled": 400,
    b"\\smuggled": 400,
    b"/%ff%fe": 200,
    b"/%c0%ae%c0%ae/smuggled": 200,
    b"/x/../smuggled": 403,
    b"/x/%2e%2e/smuggled": 403,
    b"/./smuggled": 403,
    b"/%73muggled": 403,
    b"/x\\..\\smuggled": 403,
    b"/smuggled%2f..": 403,
    b"/smuggled;x=y": 403,
    b"/smuggled?x": 403,
    b"/smuggled#x": 403,
}
"""As they are spelt, and what comes of them."""


def test_paths_that_are_none_and_paths_that_hide_another(attacked: Attacked) -> None:
    found = {}
    for path in PATHS:
        with attacked.connect() as sock:
            sock.sendall(get(path, b"Connection: close"))
            found[path] = statuses(sock)
    assert found == {path: [status] for path, status in PATHS.items()}


@pytest.mark.parametrize("line", [b"X: " + b"y" * 8000 + b"\r\n", b"X: y\r\n"], ids=["large", "many"])
def test_heads_without_end_are_refused_when_they_are_too_large(attacked: Attacked, line: bytes) -> None:
    for _ in range(MANY):
        with attacked.connect() as sock:
            with suppress(ConnectionError):
                sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n" + line * ((4 << 20) // len(line)))
            assert statuses(sock) in ([431], [])


def test_heads_that_come_a_byte_at_a_time_hold_nobody_up(attacked: Attacked) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(attacked.connect()) for _ in range(4 * MANY)]
        for sock in slow:
            sock.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 50_000)
        for _ in range(5):
            for sock in slow:
                sock.sendall(b"y")
        for sock in slow[:10]:  # who is slow, and no more than that, is served in the end
            sock.sendall(b"\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx")
            assert statuses(sock) == [200]


@pytest.mark.parametrize("size", [b"f" * 16, b"f" * 1000, b"7" + b"f" * 15, b"-1", b"1" + b"0" * 16, b"10000000"])
def test_chunks_of_sizes_that_cannot_be_are_not_waited_for_with_memory(attacked: Attacked, size: bytes) -> None:
    for _ in range(10):
        with attacked.connect() as sock:
            with suppress(ConnectionError):
                sock.sendall(post(CHUNKED, body=size + b"\r\n" + b"x" * 100_000))
                sock.shutdown(socket.SHUT_WR)
            assert statuses(sock) in ([400], [])


def test_answers_that_are_asked_for_and_never_read_are_not_kept(attacked: Attacked) -> None:
    """Each is larger than its request, and 20 000 are asked for on each connection."""
    with ExitStack() as stack:
        for _ in range(MANY):
            sock = stack.enter_context(attacked.connect())
            sock.settimeout(0.1)
            with suppress(TimeoutError, ConnectionError):
                sock.sendall(get(b"/smuggled") * 20_000)


# Before it, HTTP/2


def test_a_flood_of_http2_ends_its_connection(attacked: Attacked) -> None:
    for flood in FLOODS.values():
        for _ in range(3):
            with attacked.connect() as sock:
                with suppress(ConnectionError):
                    sock.sendall(PREFACE + SETTINGS + flood)
                _read(sock)


# Before it, HBONE by a peer who has a certificate


def test_a_waypoint_lends_its_identity_to_nobody(attacked: Attacked) -> None:
    pod = attacked.pod("shop/web-v1", 8080).ip
    own = attacked.pod(WAYPOINT, 15008).ip
    outside = attacked.pod("outside/caller", 22).ip
    targets = {
        str(attacked.service("web")): "200",
        "web.shop.svc.cluster.local:80": "200",
        f"{pod}:8080": "403",
        f"{pod}:15008": "403",
        f"{outside}:22": "403",
        "127.0.0.1:15000": "403",
        "[::1]:15000": "403",
        f"{own}:15000": "403",
        f"{own}:15008": "403",
        "169.254.169.254:80": "403",
        "198.51.100.1:80": "404",
        "istiod.istio-system.svc:15012": "404",
        "waypoint.shop.svc.cluster.local:15008": "403",
    }
    for family in (4, 6):
        link = attacked.link(family)
        with link.sock:
            for number, (target, status) in enumerate(targets.items()):
                link.send(link.connect(2 * number + 1, target))
                assert link.status(2 * number + 1) == status, target


def test_frames_that_are_none_end_their_connection(attacked: Attacked) -> None:
    for name, (data, code) in FRAMES.items():
        link = attacked.link()
        with link.sock:
            with suppress(ConnectionError, ssl.SSLError):
                link.send(data, b"" if code is not None else frame(0, 0, 7, b"x"))
            assert link.end() in (code or 1, None), name


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_flood_of_tunnels_ends_its_connection(attacked: Attacked, cancelled: bool) -> None:
    web = str(attacked.service("web"))
    link = attacked.link()
    with link.sock:
        with suppress(ConnectionError, ssl.SSLError):
            for stream in range(1, 20_001, 2):
                link.send(link.connect(stream, web), RstStreamFrame(stream, 8).serialize() if cancelled else b"")
        assert link.end() in (11, None)


def test_handshakes_that_are_begun_and_left_hold_nobody_up(attacked: Attacked) -> None:
    with ExitStack() as stack:
        for number in range(4 * MANY):
            sock = stack.enter_context(attacked.outside.connect(attacked.pod(WAYPOINT, 15008)))
            if number % 2:
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                with suppress(ssl.SSLWantReadError):
                    attacked.stolen.wrap_bio(incoming, outgoing).do_handshake()
                sock.sendall(outgoing.read()[:100])
            else:
                sock.sendall(b"\x16\x03\x01\x40\x00" + bytes(10_000))
        assert attacked.get("/")[0] == 200


# Behind it

BROKEN = {
    "/reset": 503,
    "/closes": 503,
    "/garbage": 502,
    "/echoes-tls": 502,
    "/two-lengths": 502,
    "/nul": 502,
    "/endless-line": 502,
    "/endless-head": 502,
    "/hints": 502,
    "/continues": 502,
}


def test_what_is_no_answer_is_answered_for_the_application(attacked: Attacked) -> None:
    assert {path: last_status(attacked, path) for path in BROKEN} == BROKEN


def last_status(attacked: Attacked, path: str) -> int:
    """Hints may come before it."""
    with attacked.connect("ill") as sock:
        sock.sendall(get(path.encode(), b"Connection: close"))
        return statuses(sock)[-1]


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(attacked: Attacked, version: str) -> None:
    paths = ("reset-within", "short", "huge-chunk", "endless-extension", "endless-trailers")
    script = (
        f"for p in {' '.join(paths)}; do curl -sS -m 15 {version} -o /dev/null -w '%{{http_code}} %{{exitcode}}\\n' http://ill/$p; done"
    )
    done = attacked.lab.run(CLIENT, "sh", "-c", script, timeout=90)
    found = dict(zip(paths, done.stdout.splitlines(), strict=True))
    # A part of it, nothing at all, a failure to receive, a stream that was reset.
    assert {path: told for path, told in found.items() if told.split()[1] not in ("18", "52", "56", "92")} == {}
    assert {told.split()[0] for told in found.values()} <= {"200", "000"}


def test_an_answer_that_nobody_asked_for_reaches_nobody(attacked: Attacked) -> None:
    for _ in range(5):
        assert attacked.get("/poison", "ill") == (200, b"ok")
        assert attacked.get("/two-lengths", "ill")[0] == 502


def test_what_nobody_reads_is_kept_by_who_sent_it(attacked: Attacked) -> None:
    """Hints, answers without end, and uploads to an application that does not listen."""
    with ExitStack() as stack:
        for path in (b"/hints", b"/continues", *[b"/endless-body"] * 20):
            sock = stack.enter_context(attacked.connect("ill"))
            sock.sendall(get(path))
        for _ in range(20):
            sock = stack.enter_context(attacked.connect("ill"))
            sock.settimeout(0.1)
            sock.sendall(post(CHUNKED).replace(b"POST / ", b"POST /deaf "))
            with suppress(TimeoutError):
                while True:
                    sock.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        time.sleep(1)


def test_a_pod_that_is_deleted_under_load_costs_what_it_was_asked_and_no_more(attacked: Attacked) -> None:
    lab = attacked.lab
    web = (lab.source / "web.yaml").read_text()
    without = "---\n".join(each for each in web.split("---\n") if "kind: Pod\nmetadata: {name: web-v2," not in each)
    assert without != web
    loads = [lab.start(CLIENT, "h2load", "--h1", "-n", "1500", "-c", "10", f"http://{name}/") for name in ("web", "web-v2")]
    try:
        wait_until(lambda: attacked.log_of("shop_web-v2_web").count("h2load") > 100, "it is asked")
        lab.write("web.yaml", without)
        wait_until(lambda: attacked.get("/", "web-v2") == (503, b"no healthy upstream"), "the pod is gone")
        for load in loads:
            told = load.communicate(timeout=60)[0]
            assert "1500 total, 1500 started, 1500 done" in told, told
            assert re.search(r"status codes: \d+ 2xx, 0 3xx, 0 4xx, \d+ 5xx", told), told
        assert {attacked.get("/")[0] for _ in range(10)} == {200}
    finally:
        lab.write("web.yaml", web)
        wait_until(lambda: attacked.get("/", "web-v2")[0] == 200, "it is back")
