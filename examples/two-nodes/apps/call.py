"""One gRPC call: ``python3 call.py HOST PORT SERVICE/METHOD TEXT [4|6]``. Prints the answer; or what went wrong, and exits with status 1.

The message is a google.protobuf.StringValue of TEXT. Needs the packages of this project, as `orders.py` does.
"""

import socket
import sys

import trio
from google.protobuf.wrappers_pb2 import StringValue

from mesh.rpc import RpcError, open_channel

host, port, method, text = sys.argv[1:5]
family = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(sys.argv[5] if len(sys.argv) > 5 else "", socket.AF_UNSPEC)


async def main() -> str:
    address = socket.getaddrinfo(host, int(port), family, socket.SOCK_STREAM)[0][4][0]
    async with open_channel(address, int(port), ssl_context=None, server_hostname=host) as channel:
        request = StringValue(value=text).SerializeToString()
        return StringValue.FromString(await channel.unary(f"/{method}", request, timeout=5)).value


try:
    print(trio.run(main))
except RpcError as exc:
    print(f"{exc.status.name}: {exc.message}")
    sys.exit(1)
except OSError as exc:
    print(f"{type(exc).__name__}: {exc}")
    sys.exit(1)
