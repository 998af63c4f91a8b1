"""External authorizers with foreign peers: grpcio as the authorizer of ours, and Envoy as the client whose checks ours must resemble."""

from __future__ import annotations

import http.server
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
from google.protobuf.wrappers_pb2 import BoolValue

from mesh.http.message import Headers, Request, Response
from mesh.model.address import SocketAddress, parse_ip
from mesh.model.identity import SpiffeId
from mesh.model.l7.policy import ExtAuthzGrpc, ExtAuthzHttp
from mesh.testing.envoy import Config, free_address, http_config, http_filter, running
from mesh.xds.proto import ext_authz_pb2 as pb
from waypoint_py.context import Connection
from waypoint_py.policy.authorize import Consultation
from waypoint_py.policy.consult import CHECK_METHOD, Buffered, ResponseHeaders
from waypoint_py.policy.ext_authz import ExtAuthz, connect_plainly
from waypoint_py.verdict import LocalReply

pytestmark = pytest.mark.interop

LOOPBACK = parse_ip("127.0.0.1")
CONNECTION = Connection(
    SpiffeId("cluster.local", "shop", "web"), SocketAddress(LOOPBACK, 4000), SocketAddress(LOOPBACK, 80), None, None, None
)
HOST = "api.shop"
HEADERS = (("x-a", "1"), ("x-gone", "g"), ("x-token", "t"), ("x-app", "old"))
BODY = b"hello"
# What Envoy adds to every request before its filters see it, and to those of its own.
ENVOYS = {"x-request-id", "x-forwarded-proto", "x-forwarded-for", "x-envoy-internal", "x-envoy-expected-rq-timeout-ms", "connection"}


@contextmanager
def grpc_authorizer(check: Callable[[pb.CheckRequest, grpc.ServicerContext], pb.CheckResponse]) -> Iterator[int]:
    """grpcio serving the service by Envoy's name, on a port of this machine."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            if details.method != CHECK_METHOD:
                return None
            return grpc.unary_unary_rpc_method_handler(
                check, request_deserializer=pb.CheckRequest.FromString, response_serializer=pb.CheckResponse.SerializeToString
            )

    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


class Body:
    async def buffer(self, limit: int) -> Buffered:
        await trio.lowlevel.checkpoint()
        return Buffered(BODY[:limit], len(BODY) <= limit)


def request() -> Request:
    headers: Headers = [(name.encode(), value.encode()) for name, value in (*HEADERS, ("content-length", str(len(BODY))))]
    return Request(b"POST", b"http", HOST.encode(), b"/p?a=b", headers, content_length=len(BODY))


def ask(provider: ExtAuthzHttp | ExtAuthzGrpc, asked: Request, times: int = 1) -> tuple[LocalReply | None, ResponseHeaders | None]:
    added: list[ResponseHeaders] = []

    async def main() -> LocalReply | None:
        authz = ExtAuthz(connect_plainly)
        consultation = Consultation(provider, "ext", "p", "asked")
        async with trio.open_nursery() as nursery:
            await nursery.start(authz.run)
            for _ in range(times):
                reply = await authz.ask(consultation, asked, CONNECTION, Body(), added.append).run()
            nursery.cancel_scope.cancel()
        return reply

    return trio.run(main), added[-1] if added else None


def option(name: str, value: str, **fields: Any) -> pb.HeaderValueOption:
    return pb.HeaderValueOption(header=pb.HeaderValue(key=name, value=value), **fields)


ALLOW = pb.CheckResponse(
    ok_response=pb.OkHttpResponse(
        headers=[
            option("x-user", "u"),
            option("x-a", "2", append=BoolValue(value=False)),
            option("x-app", "new", append=BoolValue(value=True)),
        ],
        headers_to_remove=["x-gone"],
        response_headers_to_add=[option("x-back", "b")],
        query_parameters_to_set=[pb.QueryParameter(key="c", value="d")],
    )
)
DENY = pb.CheckResponse(
    status={"code": 7},
    denied_response=pb.DeniedHttpResponse(status=pb.HttpStatus(code=418), headers=[option("x-why", "w")], body="no tea"),
)


def test_grpcio_as_the_authorizer_lets_through_denies_and_fails() -> None:
    def check(asked: pb.CheckRequest, context: grpc.ServicerContext) -> pb.CheckResponse:
        http = asked.attributes.request.http
        assert (http.body, asked.attributes.source.principal) == ("hello", "spiffe://cluster.local/ns/shop/sa/web")
        match http.headers["x-token"]:
            case "allow":
                return ALLOW
            case "deny":
                return DENY
        context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        raise AssertionError

    with grpc_authorizer(check) as port:
        provider = ExtAuthzGrpc("", "127.0.0.1", port, timeout=30.0, max_request_bytes=100)
        replies = {}
        for token in ("allow", "deny", "break"):
            asked = request()
            asked.replace(b"x-token", token.encode())
            replies[token] = ask(provider, asked, times=3 if token == "deny" else 1)[0]
    assert replies["allow"] is None
    assert (replies["deny"].status, replies["deny"].body) == (418, b"no tea")
    assert "not now" in replies["break"].because


# Envoy


class _Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", "0")))
        seen = json.dumps({"path": self.path, "headers": [[name.lower(), value] for name, value in self.headers.items()]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(seen)))
        self.end_headers()
        self.wfile.write(seen)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[SocketAddress]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield SocketAddress(LOOPBACK, server.server_port)
        server.shutdown()
        thread.join()


def through_envoy(ext_authz: Config, authorizer: int, *, http2: bool) -> tuple[int, dict[str, str], bytes]:
    """Our request through an Envoy with this filter: status, headers and body of what comes back."""
    address = free_address()
    with tempfile.TemporaryDirectory() as directory, serving(_Echo) as application:
        filters = [http_filter("envoy.filters.http.ext_authz", ext_authz, "ext_authz.v3.ExtAuthz")]
        config = http_config({address: filters}, application, Path(directory, "access.log"))
        config["static_resources"]["clusters"].append(_cluster(authorizer, http2=http2))
        with running(config, address), socket.create_connection((str(address.ip), address.port), timeout=30) as sock:
            lines = ["POST /p?a=b HTTP/1.1", f"host: {HOST}", *(f"{k}: {v}" for k, v in HEADERS), f"content-length: {len(BODY)}", "", ""]
            sock.sendall("\r\n".join(lines).encode() + BODY)
            data = b""
            while b"\r\n\r\n" not in data:
                data += sock.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            first, *rest = head.decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
            while len(body) < int(headers["content-length"]):
                body += sock.recv(65536)
            return int(first.split()[1]), headers, body


def _cluster(port: int, *, http2: bool) -> Config:
    endpoint = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
    kind = {"http2_protocol_options": {}} if http2 else {"http_protocol_options": {}}
    options = {"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": kind}
    return {
        "name": "authorizer",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": "authorizer", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }


WITH_BODY = {"max_request_bytes": 100, "allow_partial_message": True}


def _plain(http: pb.AttributeContext.HttpRequest) -> dict[str, object]:
    headers = {name: value for name, value in http.headers.items() if name not in ENVOYS}
    return {
        "method": http.method,
        "path": http.path,
        "host": http.host,
        "scheme": http.scheme,
        "protocol": http.protocol,
        "size": http.size,
        "body": http.body,
        "raw": http.raw_body,
        "headers": headers,
    }


@pytest.mark.parametrize("as_bytes", [False, True])
def test_our_check_and_what_follows_from_its_answer_are_envoys(as_bytes: bool) -> None:
    checks: list[pb.CheckRequest] = []

    def check(asked: pb.CheckRequest, context: grpc.ServicerContext) -> pb.CheckResponse:
        checks.append(asked)
        return ALLOW

    with grpc_authorizer(check) as port:
        service = {"envoy_grpc": {"cluster_name": "authorizer"}, "timeout": "20s"}
        config = {"transport_api_version": "V3", "grpc_service": service, "with_request_body": {**WITH_BODY, "pack_as_bytes": as_bytes}}
        status, headers, body = through_envoy(config, port, http2=True)
        asked = request()
        provider = ExtAuthzGrpc(
            "", "127.0.0.1", port, timeout=30.0, max_request_bytes=100, allow_partial_message=True, pack_as_bytes=as_bytes
        )
        reply, added = ask(provider, asked)
    theirs, ours = checks
    assert _plain(ours.attributes.request.http) == _plain(theirs.attributes.request.http)
    assert theirs.attributes.source.address.socket_address.address == ours.attributes.source.address.socket_address.address == "127.0.0.1"
    assert theirs.attributes.request.time.seconds > 0
    assert (status, reply, headers["x-back"]) == (200, None, "b")
    response = Response(200, [])
    assert added is not None
    added.apply(response)
    assert response.headers == [(b"x-back", b"b")]
    seen = json.loads(body)
    forwarded = {name: value for name, value in seen["headers"] if name not in ENVOYS and name != "host"}
    assert (asked.path.decode(), {name.decode(): value.decode() for name, value in asked.headers}) == (seen["path"], forwarded)


def test_a_grpc_authorizers_denial_reaches_the_client_as_through_envoy() -> None:
    with grpc_authorizer(lambda asked, context: DENY) as port:
        config = {"transport_api_version": "V3", "grpc_service": {"envoy_grpc": {"cluster_name": "authorizer"}, "timeout": "20s"}}
        status, headers, body = through_envoy(config, port, http2=True)
        reply, _ = ask(ExtAuthzGrpc("", "127.0.0.1", port, timeout=30.0), request())
    assert reply is not None
    assert (reply.status, reply.body, dict(reply.headers)[b"x-why"].decode()) == (status, body, headers["x-why"])


class _Recorder(http.server.BaseHTTPRequestHandler):
    """An authorizer over HTTP: says what it was asked."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    seen: list[tuple[str, str, dict[str, str], bytes]]
    answer = 200

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.seen.append((self.command, self.path, headers, self.rfile.read(int(headers.get("content-length", "0")))))
        body = b"" if self.answer == 200 else b"denied"
        self.send_response(self.answer)
        for name, value in (("x-user", "u"), ("x-other", "o"), ("x-back", "b"), ("location", "/login"), ("content-length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _patterns(*names: str) -> Config:
    return {"patterns": [{"exact": name} for name in names]}


def _http_config(port: int) -> Config:
    """As Istio writes it for a provider with these fields."""
    server = {"uri": f"http://127.0.0.1:{port}", "cluster": "authorizer", "timeout": "20s"}
    request = {"headers_to_add": [{"key": "x-new", "value": "n"}]}
    response = {
        "allowed_upstream_headers": _patterns("x-user"),
        "allowed_client_headers": _patterns("x-back"),
        "allowed_client_headers_on_success": _patterns("x-back"),
    }
    service = {"server_uri": server, "path_prefix": "/check", "authorization_request": request, "authorization_response": response}
    return {
        "transport_api_version": "V3",
        "http_service": service,
        "allowed_headers": _patterns("x-token", "x-a"),
        "with_request_body": WITH_BODY,
    }


@pytest.mark.parametrize("answer", [200, 302, 403])
def test_our_check_over_http_and_what_follows_from_its_answer_are_envoys(answer: int) -> None:
    class Recorder(_Recorder):
        seen: list[tuple[str, str, dict[str, str], bytes]] = []  # noqa: RUF012 - one for each test

    Recorder.answer = answer
    with serving(Recorder) as authorizer:
        status, headers, body = through_envoy(_http_config(authorizer.port), authorizer.port, http2=False)
        asked = request()
        provider = ExtAuthzHttp(
            "",
            "127.0.0.1",
            authorizer.port,
            path_prefix="/check",
            timeout=30.0,
            include_request_headers=("x-token", "x-a"),
            additional_headers=(("x-new", "n"),),
            max_request_bytes=100,
            allow_partial_message=True,
            headers_upstream_on_allow=("x-user",),
            headers_downstream_on_deny=("x-back",),
            headers_downstream_on_allow=("x-back",),
        )
        reply, added = ask(provider, asked)
    theirs, ours = ({name: value for name, value in seen[2].items() if name not in ENVOYS} for seen in Recorder.seen)
    assert ours == theirs
    assert [(seen[0], seen[1], seen[3]) for seen in Recorder.seen] == [("POST", "/check/p?a=b", BODY)] * 2
    if answer == 200:
        assert (status, reply) == (200, None)
        seen = json.loads(body)
        forwarded = {name: value for name, value in seen["headers"] if name not in ENVOYS and name != "host"}
        assert {name.decode(): value.decode() for name, value in asked.headers} == forwarded
        response = Response(200, [])
        assert added is not None
        added.apply(response)
        assert response.headers == [(b"x-back", headers["x-back"].encode())]
        assert "x-other" not in headers
        return
    assert reply is not None
    names = ("x-user", "x-other", "x-back", "location")
    shown = {name.decode(): value.decode() for name, value in reply.headers}
    assert (reply.status, reply.body, shown) == (status, body, {name: headers[name] for name in names if name in headers})
