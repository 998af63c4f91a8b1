"""The lab's own process: builds what the source describes, keeps it in step with every change, and answers `meshctl`.

It looks at the source, decides (`spec`, `assign`, `endpoints` are pure) and carries out the difference (`world`). Whatever it makes is
held by it and by its processes alone: its end, however it comes, is the lab's end (`init`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys

import msgspec
import trio

from mesh.telemetry.log import configure, get_logger
from meshctl_py.lab.assign import CLUSTER_DNS
from meshctl_py.lab.control import open_control_socket, serve_control
from meshctl_py.lab.dns import serve_dns
from meshctl_py.lab.init import LabConfig
from meshctl_py.lab.messages import Event, Failed, PendingWithLog, Ready, Waiting
from meshctl_py.lab.network import CannotBuild
from meshctl_py.lab.spec import KINDS
from meshctl_py.lab.status import LabStatus
from meshctl_py.lab.world import World
from meshctl_py.logs import tail

log = get_logger("lab")

_TAIL = 8
"""Lines of each log shown with a failure."""
_TELL_WITHIN = 5.0
"""Seconds a starter may take to read the outcome."""
_LOOK_AGAIN = 0.1
"""Seconds between looks at what rings no bell: agents report captured pods in files."""


class Starter:
    """Whoever called ``lab up``: hears of progress until the lab is ready; if it goes before that, so does the lab."""

    def __init__(self, descriptor: int) -> None:
        self._socket = trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor))

    async def tell(self, event: Event) -> None:
        try:
            data = memoryview(msgspec.json.encode(event) + b"\n")
            while data:
                data = data[await self._socket.send(data) :]
        except OSError:
            return  # it is gone; `wait_gone` acts on that

    async def wait_gone(self) -> None:
        try:
            while await self._socket.recv(4096):
                pass
        except OSError:
            return

    def dismiss(self) -> None:
        self._socket.close()


def main() -> None:
    """``python -m meshctl_py.lab.keeper CONFIG``, started by process 1 of the lab."""
    configure()
    trio.run(run_lab, LabConfig.parse(sys.argv[1]))


async def run_lab(config: LabConfig) -> None:
    """From nothing to ready and on, until told to stop; does not return.

    Nothing of a lab outlives it, so nothing needs a gentle end: process 1 kills what is left, faster than it could be stopped here.
    """
    starter, world, stop = Starter(config.events), World(config), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, stop)
        nursery.start_soon(_live, config, world, starter, stop)
        await stop.wait()
        log.info("lab.ends")
        os._exit(0)


async def _stop_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            stop.set()


async def _live(config: LabConfig, world: World, starter: Starter, stop: trio.Event) -> None:
    async with trio.open_nursery() as tasks:
        async with trio.open_nursery() as starting:
            starting.start_soon(_stop_when_gone, starter, stop)
            outcome = await _start(config, world, starter, stop, tasks)
            with trio.move_on_after(_TELL_WITHIN, shield=True):
                if not config.tied:
                    starting.cancel_scope.cancel()  # before it hears that all is well, and goes
                await starter.tell(outcome)
            if isinstance(outcome, Failed) and not config.keep:
                stop.set()
        starter.dismiss()


async def _stop_when_gone(starter: Starter, stop: trio.Event) -> None:
    await starter.wait_gone()
    log.warning("lab.starter_gone")
    stop.set()


async def _start(config: LabConfig, world: World, starter: Starter, stop: trio.Event, tasks: trio.Nursery) -> Ready | Failed:
    """Build everything and wait until it is ready."""
    await starter.tell(Waiting("building the network"))
    await trio.to_thread.run_sync(world.store.load)
    if not world.store.objects("Node"):
        problems = "".join(f"\n  {problem}" for problem in world.store.problems[:10])
        return Failed(f"{config.source} has no Node object: a lab needs at least one{problems}")
    try:
        await world.open(tasks)
        tasks.start_soon(_serve_cluster_dns, world)
        await world.reconcile()
    except CannotBuild as exc:
        return Failed(str(exc))
    tasks.start_soon(serve_control, open_control_socket(world.home), world, stop.set)
    tasks.start_soon(_follow_source, world)
    return await _wait_ready(config, world, starter)


async def _serve_cluster_dns(world: World) -> None:
    udp: list[trio.socket.SocketType] = []
    tcp: list[trio.SocketListener] = []
    for ip in CLUSTER_DNS:
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        datagrams = trio.socket.socket(family, socket.SOCK_DGRAM)
        await datagrams.bind((str(ip), 53))
        udp.append(datagrams)
        tcp += await trio.open_tcp_listeners(53, host=str(ip))
    await serve_dns(udp, tcp, lambda: world.zone)


async def _follow_source(world: World) -> None:
    async for change in world.store.watch():
        if any(key.kind in KINDS for key in change.changed):
            await world.reconcile()


async def _wait_ready(config: LabConfig, world: World, starter: Starter) -> Ready | Failed:
    told: Waiting | None = None
    with trio.move_on_after(config.patience):
        while True:
            rung = world.bell.rung
            pending = world.snapshot().pending()
            if not pending:
                return Ready(await world.status())
            waiting = Waiting("waiting for", tuple((what, because) for what, because, _ in pending))
            if waiting != told:
                await starter.tell(waiting)
                told = waiting
            with trio.move_on_after(_LOOK_AGAIN):
                await rung.wait()
    status = await world.status()
    return Failed(f"not ready within {config.patience:g} s", _with_logs(world, status), status)


def _with_logs(world: World, status: LabStatus) -> tuple[PendingWithLog, ...]:
    found: list[PendingWithLog] = []
    for what, because, prefix in status.pending():
        for log_file in sorted(world.home.logs.glob(f"{prefix}*.log")) or [world.home.logs / prefix]:
            found.append(PendingWithLog(what, because, log_file.name, tuple(tail(log_file, _TAIL))))
    return tuple(found)


if __name__ == "__main__":
    main()
