"""A gRPC server that says what it is: ``grpc_server.py PORT VERSION``. Messages are bytes.

``Get``: the version, and of the metadata what begins with ``x-``. ``Fail``: NOT_FOUND, without a message before. ``Break``: two messages,
then ABORTED. ``Wait``: for as many seconds as asked, or until the caller has gone. ``Chat``: each message comes back as it comes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

PORT, VERSION = sys.argv[1:]


def get(asked: bytes, context: grpc.ServicerContext) -> bytes:
    metadata = {name: value for name, value in context.invocation_metadata() if name.startswith("x-")}
    context.set_trailing_metadata((("x-served-by", VERSION),))
    return json.dumps({"version": VERSION, "metadata": metadata}).encode()


def fail(asked: bytes, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.NOT_FOUND, f"{VERSION} has no such thing: 100% gone")


def wait(asked: bytes, context: grpc.ServicerContext) -> bytes:
    until = time.monotonic() + float(asked)
    while context.is_active() and time.monotonic() < until:
        time.sleep(0.02)
    print("waited" if context.is_active() else "cancelled", flush=True)
    return b"done"


def break_off(asked: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from (b"1", b"2")
    context.abort(grpc.StatusCode.ABORTED, "in the middle")


def chat(asked: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from asked


class Shop(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        match details.method.rpartition("/")[2]:
            case "Get":
                return grpc.unary_unary_rpc_method_handler(get)
            case "Fail":
                return grpc.unary_unary_rpc_method_handler(fail)
            case "Wait":
                return grpc.unary_unary_rpc_method_handler(wait)
            case "Break":
                return grpc.unary_stream_rpc_method_handler(break_off)
            case "Chat":
                return grpc.stream_stream_rpc_method_handler(chat)
        return None


server = grpc.server(futures.ThreadPoolExecutor(16), handlers=[Shop()])
server.add_insecure_port(f"[::]:{PORT}")
server.start()
server.wait_for_termination()
