"""gRPC as routing sees it: what status a response carries, and how an answer of ours looks to a gRPC client."""

from __future__ import annotations

from typing import Final

from mesh.http.message import Headers, Message, Response
from mesh.wire.grpc import Status, decode_status_message, encode_status_message, parse_status, status_from_http
from waypoint_py.verdict import LocalReply

GRPC_STATUS: Final = b"grpc-status"
GRPC_MESSAGE: Final = b"grpc-message"

_TO_HTTP: Final = {
    Status.OK: 200,
    Status.CANCELLED: 499,
    Status.UNKNOWN: 500,
    Status.INVALID_ARGUMENT: 400,
    Status.DEADLINE_EXCEEDED: 504,
    Status.NOT_FOUND: 404,
    Status.ALREADY_EXISTS: 409,
    Status.PERMISSION_DENIED: 403,
    Status.RESOURCE_EXHAUSTED: 429,
    Status.FAILED_PRECONDITION: 400,
    Status.ABORTED: 409,
    Status.OUT_OF_RANGE: 400,
    Status.UNIMPLEMENTED: 501,
    Status.INTERNAL: 500,
    Status.UNAVAILABLE: 503,
    Status.DATA_LOSS: 500,
    Status.UNAUTHENTICATED: 401,
}


def http_from_status(status: Status) -> int:
    """The HTTP status that says about the same (google.rpc.Code's table)."""
    return _TO_HTTP[status]


def find_status(message: Message) -> Status | None:
    """``grpc-status`` of trailers, or of the head of a response without body; None if there is none. A number nobody defined: UNKNOWN."""
    value = message.first(GRPC_STATUS)
    return None if value is None else parse_status(value.decode("latin-1"))


def find_message(message: Message) -> str:
    """``grpc-message`` decoded; empty if there is none."""
    value = message.first(GRPC_MESSAGE)
    return "" if value is None else decode_status_message(value.decode("latin-1"))


def reply_status(reply: LocalReply) -> int:
    """What an answer of ours means to a gRPC client."""
    return int(status_from_http(reply.status)) if reply.grpc_status is None else reply.grpc_status


def trailers_only(reply: LocalReply) -> Response:
    """An answer of ours as a gRPC client takes it: HTTP 200, the status and the text in headers, no body."""
    headers: Headers = [(b"content-type", b"application/grpc"), (GRPC_STATUS, b"%d" % reply_status(reply))]
    if reply.body:
        headers.append((GRPC_MESSAGE, encode_status_message(reply.body.decode("utf-8", "replace")).encode()))
    return Response(200, headers + reply.headers)
