"""A connection to a service of the mesh for our own needs, such as asking an authorizer: chosen and dialled as a request's would be."""

from __future__ import annotations

from collections.abc import Callable

import trio

from mesh.model.l7.routing import Destination
from waypoint_py.policy.ext_authz import Unreachable
from waypoint_py.stream import ByteStream
from waypoint_py.upstream.balancer import Balancer, NoEndpoint, Wish
from waypoint_py.upstream.session import Connections, UpstreamFailure
from waypoint_py.waiting import TaskStream


async def reach(balancer: Balancer, connections: Connections, now: Callable[[], float], destination: Destination) -> trio.abc.Stream:
    """With our own identity, over whatever the endpoint takes. Raises Unreachable."""
    endpoint = balancer.choose(destination, Wish(), now())
    if isinstance(endpoint, NoEndpoint):
        raise Unreachable(endpoint.because)
    made = trio.Event()
    result: list[ByteStream | UpstreamFailure] = []

    def opened(stream: ByteStream | UpstreamFailure) -> None:
        result.append(stream)
        made.set()

    dialling = connections.connect(endpoint, opened)
    try:
        await made.wait()
    except trio.Cancelled:
        dialling.cancel()
        if result and not isinstance(result[0], UpstreamFailure):
            result[0].abort("nobody waits for it any more")
        raise
    stream = result[0]
    if isinstance(stream, UpstreamFailure):
        raise Unreachable(stream.because)
    return TaskStream(stream)
