"""What a mover does with its brain's messages, without a brain."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from mesh.reactor.loop import Reactor
from mesh.telemetry.output import LogOutput
from mesh.xds import client
from mesh.xds.names import ADDRESS, AUTHORIZATION
from mesh.xds.proto import discovery_pb2 as discovery
from ztunnel_py import messages
from ztunnel_py.channel import ChannelClosed, listen_at
from ztunnel_py.config import SPARE, read_config
from ztunnel_py.mover.app import Mover


def test_a_large_change_of_the_mesh_keeps_no_garbage_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[None] = []
    monkeypatch.setattr(client, "DECODE_IN_THREAD", 0)
    monkeypatch.setattr(client, "TIDY_AFTER", 0)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(None))
    config = read_config({"NODE_NAME": "n1", "MESH_SOURCE": str(tmp_path), "MESH_STATUS_DIR": str(tmp_path)})
    reactor = Reactor()
    mover = Mover("0", config, reactor, LogOutput())

    async def take(message: messages.Resources) -> None:
        rest = mover._handle(message, [])
        assert rest is not None, "it is large"
        await rest

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            mover._tidying = client.Tidying(nursery)
            for kind in (ADDRESS, AUTHORIZATION):
                await take(messages.Resources(True, discovery.DeltaDiscoveryResponse(type_url=kind).SerializeToString()))
            assert mover._plane.synced
            served = len(frozen)
            assert served
            await take(messages.Resources(False, discovery.DeltaDiscoveryResponse(type_url=ADDRESS).SerializeToString()))
            assert len(frozen) == served

    try:
        reactor.run(main)
    finally:
        reactor.close()
        os.close(mover._plane.home)


def test_a_mover_that_is_there_before_the_brain_shares_with_the_others_all_the_same(tmp_path: Path) -> None:
    environment = {"NODE_NAME": "n1", "MESH_SOURCE": str(tmp_path), "MESH_STATUS_DIR": str(tmp_path), "MOVERS": "2", "SPARE_MOVER": "true"}
    config = read_config({**environment, "RUN_DIR": str(tmp_path / "run")})
    reactor = Reactor()
    mover = Mover(SPARE, config, reactor, LogOutput())

    async def main() -> None:
        with pytest.raises(OSError, match="No such file"):
            await mover._follow_brain()
        config.own_dir.mkdir(parents=True)
        async with listen_at(config.socket_path) as brain, trio.open_nursery() as nursery:

            async def leave_at_once() -> None:
                await (await brain.accept()).aclose()

            nursery.start_soon(leave_at_once)
            with suppress(ChannelClosed):
                await mover._follow_brain()

    try:
        reactor.run(main)
        assert mover._plane.shares is not None
    finally:
        reactor.close()
        os.close(mover._plane.home)
