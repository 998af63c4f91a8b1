"""Requests through a waypoint, from a client's tunnel to an application and back."""

from __future__ import annotations

from tests.unit.waypoint_py.harness import Echo, World


def test_a_request_goes_through_and_comes_back() -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address))
            client = await world.client()
            answer = await client.get("/a?b=c", "POST", b"hello")
            assert (answer.status, answer.text) == (200, "POST /a?b=c\nhello")

    world.run(main)
