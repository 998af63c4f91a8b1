"""What becomes of a request when something goes wrong, at a waypoint and at Envoy: statuses, texts, headers, tries, flags and details."""

from __future__ import annotations

import itertools
import socket
import time
from dataclasses import dataclass
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest

from mesh.model.address import SocketAddress
from mesh.model.l7.destination import ConnectionPool, TlsMode, TrafficPolicy, UpstreamTls
from mesh.model.l7.matching import PathKind, PathMatch, RouteMatch
from mesh.model.l7.routing import Destination, DirectResponse, Fault, Forward, Mirror, Retry, Route, WeightedDestination
from mesh.reactor.tcp import socket_address
from mesh.testing.envoy import Config
from tests.interop.beside_envoy import TYPE, Application, Behaviour, Case, Reached, Seen, compare, request, reset, say, stay_silent, told
from tests.unit.waypoint_py.harness import ITSELF, ORIGIN, loopback

pytestmark = pytest.mark.interop


BY_DEFAULT = Retry()


@dataclass(frozen=True)
class Situation:
    """A request to a path of its own, by a route of its own. ``why``: the outcome differs, on purpose."""

    name: str
    behaviour: Behaviour | None = None
    to: str = "application"
    retry: Retry | None = BY_DEFAULT
    timeout: float | None = None
    fault: Fault | None = None
    mirror: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    method: str = "GET"
    body: bytes = b""
    direct: int | None = None
    then: bytes = b""
    ends: bool = False
    leaves: bool = False
    why: str = ""

    @property
    def path(self) -> str:
        return "/" + self.name.replace(" ", "-")

    @property
    def case(self) -> Case:
        raw = request(self.path, *self.headers, method=self.method, body=self.body)
        return Case(self.name, raw, self.method, self.then, self.ends, self.leaves)

    @property
    def ours(self) -> Route:
        to = ITSELF if self.to == "application" else WeightedDestination(Destination("shop", self.to, 80))
        return Route(
            ORIGIN,
            Forward((to,)) if self.direct is None else DirectResponse(self.direct, b"direct"),
            matches=(RouteMatch(path=PathMatch(PathKind.EXACT, self.path)),),
            retry=self.retry,
            timeout=self.timeout,
            fault=self.fault,
            mirrors=(Mirror(Destination("shop", self.mirror, 80)),) if self.mirror else (),
        )

    @property
    def theirs(self) -> Config:
        action: Config = {"cluster": self.to, "timeout": _duration(self.timeout or 0.0)}
        if self.timeout is None:
            action["max_stream_duration"] = {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"}
        if self.retry is not None:
            action["retry_policy"] = _retries(self.retry)
        if self.mirror:
            action["request_mirror_policies"] = [{"cluster": self.mirror}]
        if self.direct is not None:
            return {"match": {"path": self.path}, "direct_response": {"status": self.direct, "body": {"inline_string": "direct"}}}
        filters = {} if self.fault is None else {"typed_per_filter_config": {"envoy.filters.http.fault": _fault(self.fault)}}
        return {"match": {"path": self.path}, "route": action, **filters}


def _duration(seconds: float) -> str:
    return f"{seconds:g}s"


def _retries(retry: Retry) -> Config:
    found: dict[str, Any] = {
        "retry_on": ",".join(retry.on),
        "num_retries": retry.attempts,
        "retriable_status_codes": list(retry.statuses),
        "retry_back_off": {"base_interval": _duration(retry.backoff_base), "max_interval": _duration(retry.backoff_max)},
        "host_selection_retry_max_attempts": 5,
    }
    if retry.per_try_timeout is not None:
        found["per_try_timeout"] = _duration(retry.per_try_timeout)
    if not retry.previous_hosts:
        name = f"{TYPE}.retry.host.previous_hosts.v3.PreviousHostsPredicate"
        found["retry_host_predicate"] = [{"name": "previous_hosts", "typed_config": {"@type": name}}]
    return found


def _fault(fault: Fault) -> Config:
    def percentage(value: float) -> Config:
        return {"numerator": int(value), "denominator": "HUNDRED"}

    found: Config = {"@type": f"{TYPE}.filters.http.fault.v3.HTTPFault"}
    if fault.delay_percent:
        found["delay"] = {"fixed_delay": _duration(fault.delay), "percentage": percentage(fault.delay_percent)}
    if fault.abort_percent:
        kind = {"grpc_status": fault.grpc_status} if fault.status is None else {"http_status": fault.status}
        found["abort"] = {**kind, "percentage": percentage(fault.abort_percent)}
    return found


def answers(*statuses: int) -> Behaviour:
    """One after the other, and from the beginning again."""
    turns = itertools.cycle(statuses)
    return lambda sock: sock.sendall(b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi" % next(turns))


class Http2Application(Application):
    """HTTP/2: what becomes of a request is in its path, ``/reset-CODE``: the stream is reset; ``/after-CODE``: after the answer's head;
    ``/grpc-CODE``: the answer is a head with that status."""

    def _talk(self, sock: socket.socket) -> None:
        http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        http.initiate_connection()
        sock.sendall(http.data_to_send())
        while data := sock.recv(65536):
            for event in http.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    path = dict(event.headers)[":path"]
                    self.seen.append(Seen(path, ()))
                    kind, code = path[1:].split("-")[:2]
                    if kind == "grpc":
                        fields = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", code)]
                        http.send_headers(event.stream_id, fields, end_stream=True)
                        continue
                    if kind == "after":
                        http.send_headers(event.stream_id, [(":status", "200")])
                    http.reset_stream(event.stream_id, int(code))
            sock.sendall(http.data_to_send())


def change_protocol(sock: socket.socket) -> None:
    """To one that says back what it hears."""
    sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n")
    while data := sock.recv(65536):
        sock.sendall(data)


def answer_late(sock: socket.socket) -> None:
    time.sleep(0.3)
    sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlate")


def said(head: str, body: bytes = b"") -> Behaviour:
    return say(head.replace("\n", "\r\n").encode("latin-1") + body)


ENDED = "that the connection ended is told as that (UC, 503), and not as a mistake of the protocol"
NO_ANSWER = "what is no answer of the application gets one of the waypoint, where Envoy breaks the connection off"
STRICT = "what readers could understand differently is refused (RFC 9112 section 5.2)"
UNTOUCHED = "a stream that was refused is begun anew once, whatever the route says (RFC 9113 section 8.7)"
DONE = "a WebSocket that its client ends has ended well: no flag"
KEPT = "the answer is whole, and the connection good for the next request"
ONCE = Retry(attempts=1, backoff_base=0.001)
ON_5XX = Retry(attempts=2, on=("5xx",), backoff_base=0.001, previous_hosts=True)
GRPC = (("content-type", "application/grpc"), ("te", "trailers"))
WEBSOCKET = (
    *(("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13")),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
)
OK = "HTTP/1.1 200 OK\n"

SITUATIONS = (
    Situation("ok"),
    # Nobody to go to
    Situation("unknown destination", to="unknown"),
    Situation("nobody", to="nobody"),
    Situation("nobody for grpc", to="nobody", headers=GRPC, method="POST"),
    Situation("refused", to="refused", retry=None),
    Situation("refused twice", to="refused", retry=ONCE),
    Situation("refused by default", to="refused"),
    Situation("silent host", to="blackhole", retry=None),
    Situation("no tls there", to="tls", retry=None, why="the log says what was wrong with TLS"),
    # The application breaks off
    Situation("closes", say(b"")),
    Situation("resets", reset),
    Situation("closes within head", said("HTTP/1.1 200 OK\nContent-"), why=ENDED),
    Situation("gibberish", say(b"gibberish\r\n\r\n")),
    Situation("short body", said("HTTP/1.1 200 OK\ncontent-length: 10\n\n", b"abc"), why=ENDED),
    Situation("short chunks", said("HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n", b"3\r\nabc\r\n"), why=ENDED),
    Situation("bad chunk", said("HTTP/1.1 200 OK\ntransfer-encoding: chunked\n\n", b"zz\r\n")),
    # By HTTP/2
    *(Situation(f"reset {code}", to="http2", retry=None) for code in (0, 1, 2, 8, 11)),
    Situation("reset 7", to="http2", retry=None, why=UNTOUCHED),
    Situation("after 2", to="http2"),
    Situation("after 0", to="http2"),
    Situation("reset 7 by default", to="http2", why=UNTOUCHED),
    Situation("reset 2 by default", to="http2"),
    *(Situation(f"grpc-{code} from there", to="http2", headers=GRPC, method="POST") for code in (0, 1, 2, 4, 8, 13, 14)),
    # Breakers
    # The client goes
    Situation("client gone", stay_silent, leaves=True),
    Situation("client ends", answer_late, ends=True),
    # WebSocket
    Situation("websocket", change_protocol, headers=WEBSOCKET, then=b"frames", why=DONE),
    Situation("websocket in its own time", change_protocol, headers=WEBSOCKET, then=b"frames", timeout=5.0, why=DONE),
    Situation("websocket refused", answers(403), headers=WEBSOCKET, why=KEPT),
    Situation("websocket to nobody", to="nobody", headers=WEBSOCKET, why=KEPT),
    # Answers of a route, to a gRPC client
    Situation("grpc 400", direct=400, headers=GRPC, method="POST", why=KEPT),
    *(Situation(f"grpc {status}", direct=status, headers=GRPC, method="POST") for status in (200, 401, 403, 404, 408, 418, 429, 500)),
    *(Situation(f"grpc {status}", direct=status, headers=GRPC, method="POST") for status in (501, 502, 503, 504)),
    Situation("direct", direct=418),
    Situation("nobody is not tried again", to="nobody", retry=ON_5XX),
    Situation("no more requests", to="no-requests"),
    Situation("no more waiting", to="no-pending"),
    # Time
    Situation("times out", stay_silent, timeout=0.2),
    Situation("a try times out", stay_silent, retry=Retry(attempts=0, per_try_timeout=0.1), timeout=5.0),
    Situation("tries time out", stay_silent, retry=Retry(attempts=1, on=("5xx",), per_try_timeout=0.1, backoff_base=0.001)),
    Situation("in time", timeout=5.0),
    Situation("times out for grpc", to="deaf", timeout=0.2, headers=GRPC, method="POST"),
    # Tries
    Situation("503", answers(503)),
    Situation("503 again and again", answers(503), retry=ON_5XX),
    Situation("503 then 200", answers(503, 200), retry=ON_5XX),
    Situation("with a body", answers(503, 200), retry=ON_5XX, method="POST", body=b"x" * 1000),
    Situation("with a body too large to keep", answers(503), retry=ON_5XX, method="POST", body=b"x" * (3 << 20)),
    Situation("no gateway error", answers(500), retry=Retry(attempts=2, on=("gateway-error",))),
    Situation("gateway error", answers(504, 200), retry=Retry(attempts=2, on=("gateway-error",))),
    Situation("retriable 4xx", answers(409, 200), retry=Retry(attempts=2, on=("retriable-4xx",))),
    Situation("other 4xx", answers(404), retry=Retry(attempts=2, on=("retriable-4xx",))),
    Situation("status", answers(418, 200), retry=Retry(attempts=2, on=("retriable-status-codes",), statuses=(418,))),
    Situation("connect failure", to="refused", retry=Retry(attempts=1, on=("connect-failure",))),
    Situation("reset condition", say(b""), retry=Retry(attempts=1, on=("reset",))),
    Situation("reset before request", say(b""), retry=Retry(attempts=1, on=("reset-before-request",))),
    # Faults
    Situation("abort", fault=Fault(status=418, abort_percent=100.0)),
    Situation("delay", fault=Fault(delay=0.05, delay_percent=100.0)),
    Situation("delay and abort", fault=Fault(delay=0.05, delay_percent=100.0, status=503, abort_percent=100.0)),
    Situation("abort of grpc", fault=Fault(grpc_status=5, abort_percent=100.0), headers=GRPC, method="POST"),
    Situation("abort by grpc status", fault=Fault(grpc_status=14, abort_percent=100.0)),
    # Answers
    Situation("204", said("HTTP/1.1 204 No Content\n\n")),
    Situation("304", said("HTTP/1.1 304 Not Modified\ncontent-length: 10\netag: x\n\n")),
    Situation("head", said(OK + "content-length: 10\n\n"), method="HEAD"),
    Situation("until the end", said(OK + "\n", b"all of it")),
    Situation("http 1.0", said("HTTP/1.0 200 OK\n\n", b"old")),
    Situation("100", said("HTTP/1.1 100 Continue\n\n" + OK + "content-length: 2\n\n", b"ok")),
    Situation(
        *("100 and 103", said("HTTP/1.1 100 Continue\n\nHTTP/1.1 103 Early Hints\nlink: </a>\n\n" + OK + "content-length: 2\n\n", b"ok")),
        why="hints are passed on, also after another of their kind",
    ),
    Situation(
        "102", said("HTTP/1.1 102 Processing\n\n" + OK + "content-length: 2\n\n", b"ok"), why="the standard no longer has it"
    ),
    Situation("101 unasked", said("HTTP/1.1 101 Switching Protocols\n\n"), why=NO_ANSWER),
    Situation("status 99", said("HTTP/1.1 099 X\n\n"), why=NO_ANSWER),
    Situation("status 600", said("HTTP/1.1 600 X\ncontent-length: 0\n\n"), why="no status is beyond 599 (RFC 9110 section 15)"),
    Situation("status of letters", said("HTTP/1.1 abc X\n\n")),
    Situation("status 299", said("HTTP/1.1 299 Own\ncontent-length: 0\n\n")),
    Situation("length and chunked", said(OK + "content-length: 3\ntransfer-encoding: chunked\n\n", b"0\r\n\r\n")),
    Situation("two lengths", said(OK + "content-length: 1\ncontent-length: 2\n\n", b"ab")),
    Situation("length and more", said(OK + "content-length: 1\n\n", b"abc")),
    Situation("trailers", said(OK + "transfer-encoding: chunked\ntrailer: x-t\n\n", b"1\r\na\r\n0\r\nx-t: 1\r\n\r\n")),
    Situation("folded", said(OK + "x-a: 1\n 2\ncontent-length: 0\n\n"), why=STRICT),
    Situation("no colon", said(OK + "nonsense\n\n")),
    Situation("control character", said(OK + "x-a: a\x01b\ncontent-length: 0\n\n")),
    Situation("huge head", said(OK + f"x-a: {'y' * 70_000}\ncontent-length: 0\n\n"), why="heads of answers are bounded too"),
    Situation("many fields", said(OK + "".join(f"x-{number}: 1\n" for number in range(110)) + "content-length: 0\n\n")),
    Situation("of one hop", said(
        OK + "connection: x-a, keep-alive\nx-a: 1\nkeep-alive: timeout=5\nproxy-connection: x\nupgrade: h2c\nproxy-authenticate: Basic\n"
        "te: trailers\ncontent-length: 0\n\n"
    ), why="what an answer's connection names ends here too (RFC 9110 section 7.6.1)"),
    Situation("of a proxy", said(
        OK + "server: app\ndate: Mon, 01 Jan 2024 00:00:00 GMT\nx-envoy-upstream-service-time: 99\nx-envoy-overloaded: true\n"
        "x-envoy-attempt-count: 3\nx-envoy-decorator-operation: x\nx-envoy-degraded: 1\nvia: 1.1 x\nx-request-id: other\n"
        "set-cookie: a=1\nset-cookie: b=2\nx-envoy-ratelimited: true\nx-envoy-immediate-health-check-fail: 1\ncontent-length: 0\n\n"
    )),
    Situation("mirrored", mirror="mirror", method="POST", body=b"abc", why="Envoy says of a copy who made it"),
)  # fmt: skip


def deaf() -> socket.socket:
    """A listener whose connections nobody reads."""
    return socket.create_server((str(loopback()), 0))


def blackhole() -> tuple[SocketAddress, list[socket.socket]]:
    """A listener that accepts nothing, its queue full: the kernel drops what comes."""
    listener = socket.socket()
    listener.bind((str(loopback()), 0))
    listener.listen(0)
    ip, port = listener.getsockname()
    held = [listener]
    for _ in range(4):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex((ip, port))
        held.append(filler)
    return SocketAddress.parse(f"{ip}:{port}"), held


def test_what_goes_wrong_has_the_same_outcome() -> None:
    application = Application({each.path: each.behaviour for each in SITUATIONS if each.behaviour is not None})
    http2 = Http2Application({})
    application.seen, application.open = http2.seen, http2.open
    hole, held = blackhole()
    held.append(unheard := deaf())
    tls = {"@type": f"{TYPE}.transport_sockets.tls.v3.UpstreamTlsContext"}
    quick = ConnectionPool(connect_timeout=0.3)
    others = {
        "nobody": Reached(),
        "refused": Reached((SocketAddress(loopback(), 9),)),
        "blackhole": Reached((hole,), TrafficPolicy(pool=quick), {"connect_timeout": "0.3s"}),
        "tls": Reached(
            *((application.address,), TrafficPolicy(tls=UpstreamTls(TlsMode.SIMPLE, sni="a.example"))),
            {"transport_socket": {"name": "tls", "typed_config": tls}},
        ),
        "no-requests": Reached(
            *((application.address,), TrafficPolicy(pool=ConnectionPool(max_requests=0))),
            {"circuit_breakers": {"thresholds": [{"max_requests": 0}]}},
        ),
        "no-pending": Reached(
            *((application.address,), TrafficPolicy(pool=ConnectionPool(max_pending=0))),
            {"circuit_breakers": {"thresholds": [{"max_pending_requests": 0}]}},
        ),
        "deaf": Reached((socket_address(unheard.getsockname()),), http2=True),
        "mirror": Reached((application.address,)),
        "http2": Reached((http2.address,), http2=True),
    }
    no_route = Case("no route", request("/elsewhere"))
    pair = compare(
        [*(each.case for each in SITUATIONS), no_route],
        application=application,
        ours=[each.ours for each in SITUATIONS],
        theirs=[each.theirs for each in SITUATIONS],
        others=others,
    )
    http2.close()
    for each in held:
        each.close()
    different = pair.different()
    deliberate = {each.name for each in SITUATIONS if each.why}
    assert set(different) == deliberate, told({name: pair for name, pair in different.items() if name not in deliberate})
