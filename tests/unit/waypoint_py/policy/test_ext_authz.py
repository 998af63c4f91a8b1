"""Waiting for an external authorizer: its word, its silence, and everything that can be wrong with it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial

import h11
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair, wait_all_tasks_blocked

from mesh.http.message import Request, Response
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.policy import ExtAuthzGrpc, ExtAuthzHttp
from mesh.rpc import Call, Handler, RpcError, Status, Unary, serve_connection
from mesh.xds.proto import ext_authz_pb2 as pb
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import Consultation
from waypoint_py.policy.consult import CHECK_METHOD, Buffered, ResponseHeaders
from waypoint_py.policy.ext_authz import BodySource, ExtAuthz, Unreachable, connect_plainly
from waypoint_py.verdict import Flag, LocalReply

CONNECTION = Connection(
    SpiffeId("cluster.local", "shop", "web"),
    SocketAddress(parse_ip("10.0.0.7"), 4000),
    SocketAddress(parse_ip("10.96.0.1"), 80),
    None,
    None,
    None,
)
Serve = Callable[[trio.abc.Stream], Awaitable[None]]


def http(**fields: object) -> Consultation:
    provider = ExtAuthzHttp("auth", "auth.svc", 8000, **{"timeout": 5.0, **fields})
    return Consultation(provider, "ext", "ns[shop]-policy[c]-rule[0]", "asked")


def grpc(**fields: object) -> Consultation:
    provider = ExtAuthzGrpc("auth", "auth.svc", 9000, **{"timeout": 5.0, **fields})
    return Consultation(provider, "ext", "ns[shop]-policy[c]-rule[0]", "asked")


def request() -> Request:
    return Request(b"GET", b"http", b"api.shop", b"/a?b", [(b"x-token", b"t")])


class Authorizer:
    """An authorizer at the other end of memory streams; counts connections. ``serve`` None: there is no way to it."""

    def __init__(self, serve: Serve | None) -> None:
        self.serve = serve
        self.connections = 0
        self.asked_for: list[tuple[str, str, int]] = []
        self.nursery: trio.Nursery | None = None

    async def connect(self, namespace: str, hostname: str, port: int) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.asked_for.append((namespace, hostname, port))
        if self.serve is None:
            raise Unreachable("no endpoint is healthy")
        self.connections += 1
        ours, theirs = memory_stream_pair()
        assert self.nursery is not None
        self.nursery.start_soon(self._serve, self.serve, theirs)
        return ours

    async def _serve(self, serve: Serve, stream: trio.abc.Stream) -> None:
        try:
            await serve(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


class Body:
    """A request's body that is all there."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def buffer(self, limit: int) -> Buffered:
        await trio.lowlevel.checkpoint()
        return Buffered(self.data[:limit], len(self.data) <= limit)


def run(authorizer: Authorizer, test: Callable[[ExtAuthz], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as servers:
            authorizer.nursery = servers
            authz = ExtAuthz(authorizer.connect, identity="spiffe://us", now=lambda: 0.0)
            async with trio.open_nursery() as nursery:
                await nursery.start(authz.run)
                await test(authz)
                nursery.cancel_scope.cancel()
            servers.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def asked(
    authorizer: Authorizer, consultation: Consultation, req: Request | None = None, body: BodySource | None = None
) -> tuple[LocalReply | None, ResponseHeaders | None]:
    """One request's check: the reply, and what was to be added to the response."""
    outcome: list[LocalReply | None] = []
    added: list[ResponseHeaders] = []

    async def check(authz: ExtAuthz) -> None:
        outcome.append(await authz.ask(consultation, req or request(), CONNECTION, body, added.append).run())

    run(authorizer, check)
    return outcome[0], added[0] if added else None


def answering(*answers: bytes) -> Authorizer:
    """Answers the requests of each connection in turn, then closes."""

    async def serve(stream: trio.abc.Stream) -> None:
        for answer in answers:
            await stream.receive_some(65536)
            await stream.send_all(answer)
        await stream.aclose()

    return Authorizer(serve)


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-user: u\r\nset-cookie: c\r\n\r\n"


def is_error(reply: LocalReply | None, status: int = 403) -> bool:
    return reply is not None and (reply.status, reply.body, reply.details, reply.flags) == (
        status,
        b"",
        "ext_authz_error",
        (Flag.UNAUTHORIZED_EXTERNAL_SERVICE,),
    )


# HTTP


def test_an_authorizer_that_says_200_lets_the_request_through_with_its_headers() -> None:
    req = request()
    authorizer = answering(OK)
    consultation = http(headers_upstream_on_allow=("x-user",), headers_downstream_on_allow=("set-cookie",))
    reply, added = asked(authorizer, consultation, req)
    assert (reply, authorizer.asked_for) == (None, [("auth", "auth.svc", 8000)])
    assert req.headers == [(b"x-token", b"t"), (b"x-user", b"u")]
    response = Response(200, [])
    assert added is not None
    added.apply(response)
    assert response.headers == [(b"set-cookie", b"c")]


def test_a_denial_is_what_the_authorizer_says() -> None:
    reply, added = asked(answering(b"HTTP/1.1 302 Found\r\nlocation: /login\r\ncontent-length: 3\r\n\r\nno!"), http())
    assert reply is not None
    assert added is None
    assert (reply.status, reply.headers, reply.body) == (302, [(b"location", b"/login")], b"no!")
    assert (reply.details, reply.flags) == ("ext_authz_denied", (Flag.UNAUTHORIZED_EXTERNAL_SERVICE,))
    assert reply.policy == "ns[shop]-policy[c]-rule[0]"


def _silent() -> Authorizer:
    async def serve(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    return Authorizer(serve)


def _dribbling() -> Authorizer:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 403 No\r\ncontent-length: 100\r\n\r\n")
        for _ in range(100):
            await stream.send_all(b"x")
            await trio.sleep(1)

    return Authorizer(serve)


HOSTILE = {
    "there is no way to it": (lambda: Authorizer(None), "no endpoint is healthy"),
    "silent": (_silent, "no answer within 5 s"),
    "dribbling": (_dribbling, "no answer within 5 s"),
    "closes": (lambda: answering(), "HTTP/1.1"),
    "garbage": (lambda: answering(b"\x00\xff garbage\r\n\r\n"), "HTTP/1.1"),
    "5xx": (lambda: answering(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"), "answered 503"),
    "huge body": (lambda: answering(b"HTTP/1.1 403 No\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 1_000_000), "larger than"),
    "endless headers": (lambda: answering(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000), "HTTP/1.1"),
    "cut off": (lambda: answering(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nx"), "HTTP/1.1"),
    "endless 100s": (lambda: answering(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), "HTTP/1.1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_authorizer_refuses_or_lets_through_as_configured(name: str) -> None:
    make, reason = HOSTILE[name]
    reply, _ = asked(make(), http())
    assert is_error(reply)
    assert reply is not None
    assert re.search(reason, reply.because)
    assert is_error(asked(make(), http(status_on_error=503))[0], 503)
    assert asked(make(), http(fail_open=True)) == (None, None)


def test_a_connection_is_kept_and_one_that_went_away_is_replaced() -> None:
    async def check(authz: ExtAuthz) -> None:
        for _ in range(4):
            assert await authz.ask(http(), request(), CONNECTION, None, lambda added: None).run() is None

    authorizer = answering(OK, OK)
    run(authorizer, check)
    assert authorizer.connections == 2


def test_checks_at_the_same_time_have_connections_of_their_own() -> None:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some(65536)
        await trio.sleep(1)
        await stream.send_all(OK)

    async def check(authz: ExtAuthz) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(authz.ask(http(), request(), CONNECTION, None, lambda added: None).run)
        assert trio.current_time() < 3

    authorizer = Authorizer(serve)
    run(authorizer, check)
    assert authorizer.connections == 20


def recording(seen: list[tuple[h11.Request, bytes]]) -> Authorizer:
    async def serve(stream: trio.abc.Stream) -> None:
        connection = h11.Connection(h11.SERVER)
        body = b""
        head: h11.Request | None = None
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(65536)))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                break
        assert head is not None
        seen.append((head, body))
        await stream.send_all(OK)

    return Authorizer(serve)


def test_a_body_goes_to_the_authorizer_within_its_bound() -> None:
    seen: list[tuple[h11.Request, bytes]] = []
    assert asked(recording(seen), http(max_request_bytes=4), body=Body(b"1234"))[0] is None
    assert asked(recording(seen), http(max_request_bytes=4, allow_partial_message=True), body=Body(b"12345"))[0] is None
    assert asked(recording(seen), http(max_request_bytes=4))[0] is None
    assert asked(recording(seen), http(), body=Body(b"12345"))[0] is None
    assert [body for _, body in seen] == [b"1234", b"1234", b"", b""]
    partial = [dict(head.headers).get(b"x-envoy-auth-partial-body") for head, _ in seen]
    assert partial == [b"false", b"true", b"false", None]


def test_a_body_that_is_too_long_is_413_and_nobody_is_asked() -> None:
    authorizer = answering(OK)
    reply, _ = asked(authorizer, http(max_request_bytes=4), body=Body(b"12345"))
    assert reply is not None
    assert (reply.status, reply.details, authorizer.connections) == (413, "request_payload_too_large", 0)


def test_an_upgrades_body_is_never_waited_for() -> None:
    class Endless:
        async def buffer(self, limit: int) -> Buffered:
            raise AssertionError

    req = request()
    req.upgrade = b"websocket"
    assert asked(answering(OK), http(max_request_bytes=4), req, Endless())[0] is None


# gRPC


def grpc_server(handle: Callable[[bytes, Call], Awaitable[bytes]]) -> Authorizer:
    handlers: dict[str, Handler] = {CHECK_METHOD: Unary(handle)}
    return Authorizer(partial(serve_connection, handlers=handlers))


async def _allow(message: bytes, call: Call) -> bytes:
    check = pb.CheckRequest.FromString(message)
    assert check.attributes.destination.principal == "spiffe://us"
    value = f"{check.attributes.source.principal} {check.attributes.request.http.path}"
    header = pb.HeaderValueOption(header=pb.HeaderValue(key="x-seen", value=value))
    return pb.CheckResponse(ok_response=pb.OkHttpResponse(headers=[header])).SerializeToString()


async def _deny(message: bytes, call: Call) -> bytes:
    denied = pb.DeniedHttpResponse(status=pb.HttpStatus(code=401), body="who are you?")
    return pb.CheckResponse(status={"code": 16}, denied_response=denied).SerializeToString()


def test_a_grpc_authorizer_decides_and_changes_the_request() -> None:
    req = request()
    assert asked(grpc_server(_allow), grpc(), req)[0] is None
    assert req.first(b"x-seen") == b"spiffe://cluster.local/ns/shop/sa/web /a?b"
    reply, _ = asked(grpc_server(_deny), grpc())
    assert reply is not None
    assert (reply.status, reply.body, reply.details) == (401, b"who are you?", "ext_authz_denied")


async def _fail(message: bytes, call: Call) -> bytes:
    raise RpcError(Status.INTERNAL, "oops")


async def _hang(message: bytes, call: Call) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def _garbage(message: bytes, call: Call) -> bytes:
    return b"\xff\xff\xff"


async def _huge(message: bytes, call: Call) -> bytes:
    return b"x" * (2 << 20)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Authorizer(None), "no endpoint"),
        (lambda: grpc_server(_fail), "oops"),
        (lambda: grpc_server(_hang), "within 5"),
        (lambda: grpc_server(_garbage), "no CheckResponse"),
        (lambda: grpc_server(_huge), "larger"),
        (lambda: Authorizer(partial(serve_connection, handlers={})), "UNIMPLEMENTED"),
        (_silent, "within 5"),
        (lambda: answering(), ""),
        (lambda: answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"), ""),
    ],
    ids=["no way", "fails", "hangs", "garbage", "huge", "another service", "silent", "closes", "speaks HTTP/1.1"],
)
def test_a_hostile_grpc_authorizer_refuses_or_lets_through_as_configured(make: Callable[[], Authorizer], reason: str) -> None:
    reply, _ = asked(make(), grpc())
    assert is_error(reply)
    assert reply is not None
    assert reason in reply.because
    assert asked(make(), grpc(fail_open=True)) == (None, None)


def test_checks_share_a_connection_and_a_lost_one_is_replaced() -> None:
    connections: list[trio.abc.Stream] = []

    async def serve(stream: trio.abc.Stream) -> None:
        connections.append(stream)
        await serve_connection(stream, {CHECK_METHOD: Unary(_allow)})

    async def check(authz: ExtAuthz) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(authz.ask(grpc(), request(), CONNECTION, None, lambda added: None).run)
        assert len(connections) == 1
        await trio.aclose_forcefully(connections[0])
        await wait_all_tasks_blocked()
        assert await authz.ask(grpc(), request(), CONNECTION, None, lambda added: None).run() is None
        assert len(connections) == 2

    run(Authorizer(serve), check)


def test_a_connection_is_asked_about_by_grpc() -> None:
    outcome: list[LocalReply | None] = []

    async def check(authz: ExtAuthz) -> None:
        outcome.append(await authz.ask_connection(grpc(), CONNECTION).run())

    run(grpc_server(_allow), check)
    run(grpc_server(_deny), check)
    run(Authorizer(None), check)
    assert outcome[0] is None
    assert [reply.details for reply in outcome[1:] if reply] == ["ext_authz_denied", "ext_authz_error"]


def test_a_waypoint_that_goes_down_refuses() -> None:
    async def main() -> None:
        authorizer = grpc_server(_allow)
        authz = ExtAuthz(authorizer.connect)
        assert is_error(await authz.ask(grpc(), request(), CONNECTION, None, lambda added: None).run())

    trio.run(main)


def test_a_plain_connection_reaches_an_authorizer_on_this_machine() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(OK)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            provider = ExtAuthzHttp("", "127.0.0.1", listeners[0].socket.getsockname()[1], timeout=5.0)
            authz = ExtAuthz(connect_plainly)
            await nursery.start(authz.run)
            consultation = Consultation(provider, "ext", "p", "asked")
            assert await authz.ask(consultation, request(), CONNECTION, None, lambda added: None).run() is None
            nursery.cancel_scope.cancel()

    trio.run(main)
