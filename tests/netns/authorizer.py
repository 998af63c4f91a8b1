"""An external authorizer, by HTTP and by gRPC: ``authorizer.py HTTP_PORT GRPC_PORT``.

It lets through who sends ``x-token: good``, and says who that is; ``x-token: slow`` it answers after a while, ``x-token: broken`` not at
all.
"""

from __future__ import annotations

import http.server
import socket
import sys
import time
from concurrent import futures

import grpc

from mesh.xds.proto import ext_authz_pb2 as pb

CHECK = "/envoy.service.auth.v3.Authorization/Check"
SLOW = 2.0


class ByHttp(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        token = self.headers.get("x-token")
        if token == "slow":
            time.sleep(SLOW)
        if token == "broken":
            self.close_connection = True
            return
        body = b"" if token == "good" else f"no entry for {self.command} {self.path}\n".encode()
        self.send_response(200 if token == "good" else 418)
        self.send_header("x-user", "ann")
        self.send_header("x-secret", "of the authorizer")
        self.send_header("x-seen", ",".join(sorted(name.lower() for name in self.headers if name.lower().startswith("x-"))))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what passes is seen elsewhere."""


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True


class ByGrpc(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method != CHECK:
            return None
        return grpc.unary_unary_rpc_method_handler(
            check, request_deserializer=pb.CheckRequest.FromString, response_serializer=pb.CheckResponse.SerializeToString
        )


def check(asked: pb.CheckRequest, context: grpc.ServicerContext) -> pb.CheckResponse:
    request = asked.attributes.request.http
    token = request.headers.get("x-token")
    if token == "slow":
        time.sleep(SLOW)
    if token == "broken":
        context.abort(grpc.StatusCode.INTERNAL, "broken")
    if token == "good":
        peer = pb.HeaderValueOption(header=pb.HeaderValue(key="x-peer", value=asked.attributes.source.principal))
        body = pb.HeaderValueOption(header=pb.HeaderValue(key="x-body", value=request.body))
        return pb.CheckResponse(ok_response=pb.OkHttpResponse(headers=[peer, body], headers_to_remove=["x-token"]))
    denied = pb.DeniedHttpResponse(status=pb.HttpStatus(code=418), body=f"no entry for {request.method} {request.path}")
    return pb.CheckResponse(status={"code": 7}, denied_response=denied)


server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[ByGrpc()])
server.add_insecure_port(f"[::]:{sys.argv[2]}")
server.start()
Server(("::", int(sys.argv[1])), ByHttp).serve_forever()
