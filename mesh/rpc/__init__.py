"""gRPC on trio: `mesh.http.h2` does HTTP/2, `mesh.wire.grpc` the framing. Unary and bidirectional calls, client and server.

No maintained gRPC library runs on trio; grpcio is the oracle in tests.
"""

from mesh.rpc.client import Channel, ClientStream, open_channel, open_channel_on
from mesh.rpc.connection import Limits
from mesh.rpc.errors import RpcError
from mesh.rpc.server import Bidi, Call, Handler, Peer, ServerStream, Unary, serve, serve_connection
from mesh.wire.grpc import Status

__all__ = [
    "Bidi",
    "Call",
    "Channel",
    "ClientStream",
    "Handler",
    "Limits",
    "Peer",
    "RpcError",
    "ServerStream",
    "Status",
    "Unary",
    "open_channel",
    "open_channel_on",
    "serve",
    "serve_connection",
]
