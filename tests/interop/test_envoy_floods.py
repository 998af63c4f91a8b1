"""Floods of HTTP/2 end their connection at a waypoint as they do at Envoy, and neither lets the application have more of them."""

from __future__ import annotations

from contextlib import closing, suppress

import pytest
import trio

from mesh.wire.errors import ErrorCode
from mesh.wire.frames import PREFACE, FrameType
from tests.interop.beside_envoy import DEFAULT, Application, cluster, envoy, manager
from tests.unit.mesh.http.h2_peer import frames_of
from tests.unit.waypoint_py.harness import World
from tests.unit.waypoint_py.test_hostile_http2 import FLOODS, PING, SETTINGS

pytestmark = pytest.mark.interop

BORNE = {"PING", "SETTINGS"}
"""Envoy counts answers that wait to be read, and these are read. A waypoint counts frames that are of no use: each costs it as much, and
its neighbours, whoever reads the answers."""


async def code_of(stream: trio.abc.Stream, flood: bytes) -> int | None:
    """How the connection ends: the GOAWAY's code, -1 without one; None if it bears the flood, and answers what is asked after it."""
    heard = b""
    marked = PING[:9] + b"after it"
    answer = PING[:4] + b"\1" + marked[5:]

    async def send() -> None:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(PREFACE + SETTINGS + flood + marked)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with suppress(trio.BrokenResourceError):
            while data := await stream.receive_some(65536):
                heard += data
                if answer in heard:
                    nursery.cancel_scope.cancel()
                    return None
        nursery.cancel_scope.cancel()
    codes = [frame.error_code for frame in frames_of(heard) if frame.type == FrameType.GOAWAY]
    return codes[-1] if codes else -1


def test_a_flood_ends_its_connection() -> None:
    world = World()
    application = Application({})
    found: dict[str, tuple[int | None, int | None]] = {}
    with closing(application), envoy([cluster("application", application.address)], lambda log: manager(log, [DEFAULT])) as beside:

        async def main() -> None:
            world.describe(world.endpoint(application.address))
            for name, flood in FLOODS.items():
                ours = await code_of(await world.open(), flood)
                theirs = await code_of(await trio.open_tcp_stream(str(beside.address.ip), beside.address.port), flood)
                found[name] = (ours, theirs)
            application.hang_up()
            await world.until(lambda: not application.open)

        world.run(main)
    assert {name for name, (ours, _) in found.items() if ours != ErrorCode.ENHANCE_YOUR_CALM} == set()
    assert {name for name, (_, theirs) in found.items() if theirs is None} == BORNE
