"""A gRPC service: ``python3 orders.py PORT VERSION``. `shop.Orders/Place` and `shop.Orders/List` answer with what they are and were sent.

Messages are google.protobuf.StringValue. Needs the packages of this project, which the lab's python3 and the project's image have.
"""

import sys

import trio
from google.protobuf.wrappers_pb2 import StringValue

from mesh.rpc import Call, Unary, serve

VERSION = sys.argv[2]


async def answer(request: bytes, call: Call) -> bytes:
    said = StringValue.FromString(request).value
    return StringValue(value=f"{call.path.rpartition('/')[2]} by {VERSION}: {said}").SerializeToString()


async def main() -> None:
    listeners = await trio.open_tcp_listeners(int(sys.argv[1]))
    methods = ("/shop.Orders/Place", "/shop.Orders/List")
    await serve(listeners, {method: Unary(answer) for method in methods}, tls=None)


trio.run(main)
