"""What the waypoint says with CONNECT to a destination's node agent. All of it is for telemetry: policy there looks at the certificate."""

from __future__ import annotations

import random
from collections.abc import Mapping

from mesh.model.workload import Workload
from mesh.wire.baggage import baggage_of
from mesh.wire.forwarded import write_forwarded
from mesh.wire.traceparent import new_traceparent
from waypoint_py.context import Connection
from waypoint_py.upstream.session import Endpoint


def announce(waypoint: Workload | None, endpoint: Endpoint, client: Connection | None, rng: random.Random) -> Mapping[str, str]:
    """Headers of CONNECT. ``waypoint``: our own workload. ``client``: whose bytes alone the tunnel will carry; None for one that the
    requests of many share, which names no client then: it would be wrong for all but the first."""
    headers = {"x-istio-source": "waypoint"}
    if waypoint is not None:
        headers["baggage"] = baggage_of(waypoint)
    host = endpoint.service.hostname if endpoint.service is not None else None
    if client is not None:
        headers["forwarded"] = write_forwarded(client.peer_address, host)
    elif host is not None:
        headers["forwarded"] = f"host={host}"
    headers["traceparent"] = client.traceparent if client is not None and client.traceparent else new_traceparent(rng)
    return headers
