"""How a remote call fails: one exception with gRPC's status."""

from __future__ import annotations

from mesh.wire.grpc import Status


class RpcError(Exception):
    """A call ended with a status other than OK, from the peer or from this side; ``str()`` is ``UNAVAILABLE: reason``."""

    def __init__(self, status: Status, message: str = "") -> None:
        super().__init__(f"{status.name}: {message}" if message else status.name)
        self.status = status
        self.message = message
