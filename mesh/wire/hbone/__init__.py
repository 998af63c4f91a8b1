"""HBONE: tunnels as CONNECT streams of HTTP/2, as two sans-I/O cores. `connection` explains how to drive them, `events` what they tell."""

from mesh.wire.hbone.client import CLIENT_LIMITS, HboneClient
from mesh.wire.hbone.connection import HboneConnection, Limits
from mesh.wire.hbone.events import (
    GoingAway,
    HboneEvent,
    MoreStreamsAllowed,
    PingAcknowledged,
    RequestRefused,
    TunnelData,
    TunnelEnded,
    TunnelRequested,
    TunnelReset,
    TunnelResponded,
    WindowOpened,
)
from mesh.wire.hbone.server import SERVER_LIMITS, HboneServer

__all__ = [
    "CLIENT_LIMITS",
    "SERVER_LIMITS",
    "GoingAway",
    "HboneClient",
    "HboneConnection",
    "HboneEvent",
    "HboneServer",
    "Limits",
    "MoreStreamsAllowed",
    "PingAcknowledged",
    "RequestRefused",
    "TunnelData",
    "TunnelEnded",
    "TunnelRequested",
    "TunnelReset",
    "TunnelResponded",
    "WindowOpened",
]
