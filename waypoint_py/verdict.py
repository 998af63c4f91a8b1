"""What a filter says about a request, and what the client is told when it goes no further. Every verdict carries its reason.

A filter is a plain function ``(request, facts) -> Verdict``: None lets the request go on, a `LocalReply` answers it here, a `Park` needs to
wait for something (keys, an authorizer) and is the only way into trio.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from mesh.http.message import Headers


class Flag(Enum):
    """Response flags of the access log and of ``response_flags`` in metrics, by Envoy's names."""

    DOWNSTREAM_CONNECTION_TERMINATION = "DC"
    NO_HEALTHY_UPSTREAM = "UH"
    UPSTREAM_REQUEST_TIMEOUT = "UT"
    UPSTREAM_REMOTE_RESET = "UR"
    UPSTREAM_CONNECTION_FAILURE = "UF"
    UPSTREAM_CONNECTION_TERMINATION = "UC"
    UPSTREAM_OVERFLOW = "UO"
    UPSTREAM_RETRY_LIMIT_EXCEEDED = "URX"
    NO_ROUTE_FOUND = "NR"
    DELAY_INJECTED = "DI"
    FAULT_INJECTED = "FI"
    UNAUTHORIZED_EXTERNAL_SERVICE = "UAEX"
    DOWNSTREAM_PROTOCOL_ERROR = "DPE"
    UPSTREAM_PROTOCOL_ERROR = "UPE"
    NO_CLUSTER_FOUND = "NC"


@dataclass(frozen=True, slots=True)
class LocalReply:
    """An answer of ours. ``body`` is text; a gRPC client gets its status and the body as ``grpc-message`` instead (`waypoint_py.replies`).

    ``details``: Envoy's ``response_code_details``. ``because``: for people, with the policy or route that decided. ``grpc_status``
    overrides what ``status`` maps to.
    """

    status: int
    body: bytes = b""
    headers: Headers = field(default_factory=list)
    flags: tuple[Flag, ...] = ()
    details: str = ""
    because: str = ""
    grpc_status: int | None = None
    policy: str = ""
    """``ns[shop]-policy[name]-rule[0]``, when a policy decided."""
    close: bool = False
    """The connection has to end with it (HTTP/1.1 that cannot be trusted any more)."""


@dataclass(frozen=True, slots=True)
class Park:
    """``run`` waits in trio and returns the verdict; it never raises. ``why``: for inspection, what is waited for."""

    run: Callable[[], Awaitable[LocalReply | None]]
    why: str


Verdict: TypeAlias = LocalReply | Park | None
