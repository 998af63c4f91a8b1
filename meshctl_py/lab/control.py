"""The lab's side of the control socket: who can open it, the lab's own user, may do everything."""

from __future__ import annotations

import array
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Final, assert_never

import msgspec
import trio

from mesh.linux.unix_sockets import unix_address
from mesh.telemetry.log import get_logger
from meshctl_py.lab.containers import base_environment
from meshctl_py.lab.home import LabHome
from meshctl_py.lab.messages import (
    MAX_REQUEST,
    AskDown,
    AskEntry,
    AskRestart,
    AskSignal,
    AskStatus,
    Done,
    EntryReply,
    Refused,
    Reply,
    Request,
    StatusReply,
)
from meshctl_py.lab.world import World

log = get_logger("lab.control")

_REQUEST_WITHIN: Final = 5.0
"""Seconds a client has to say what it wants."""
_DECODER: Final[msgspec.json.Decoder[Request]] = msgspec.json.Decoder(Request)


def open_control_socket(home: LabHome) -> socket.socket:
    """Listen on ``control.sock``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with unix_address(home.control) as address:
        sock.bind(address)
    sock.listen(64)
    return sock


async def serve_control(sock: socket.socket, world: World, stop: Callable[[], None]) -> None:
    """Answer until cancelled; ``stop`` is called when a client wants the lab to end."""
    sock.setblocking(False)
    listener = trio.socket.from_stdlib_socket(sock)
    async with trio.open_nursery() as nursery:
        while True:
            client, _ = await listener.accept()
            nursery.start_soon(_serve_client, client, world, stop)


async def _serve_client(client: trio.socket.SocketType, world: World, stop: Callable[[], None]) -> None:
    with client:
        try:
            with trio.fail_after(_REQUEST_WITHIN):
                request = await _receive(client)
            await _answer(client, request, world)
        except (msgspec.DecodeError, trio.TooSlowError, OSError) as exc:
            log.warning("control.bad_request", error=str(exc))
            return
    if isinstance(request, AskDown):
        stop()


async def _receive(client: trio.socket.SocketType) -> Request:
    data = b""
    while not data.endswith(b"\n"):
        part = await client.recv(65536)
        data += part
        if not part or len(data) > MAX_REQUEST:
            raise msgspec.DecodeError("no request in a line of reasonable length")
    return _DECODER.decode(data)


async def _answer(client: trio.socket.SocketType, request: Request, world: World) -> None:
    descriptors: list[int] = []
    try:
        reply = await _decide(request, world, descriptors)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        data = memoryview(msgspec.json.encode(reply) + b"\n")
        sent = await client.sendmsg([data], rights)
        while sent < len(data):
            sent += await client.send(data[sent:])
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


async def _decide(request: Request, world: World, descriptors: list[int]) -> Reply:
    match request:
        case AskStatus():
            return StatusReply(await world.status())
        case AskEntry():
            return _enter(request, world, descriptors)
        case AskSignal():
            return _signal(request, world)
        case AskRestart():
            process = world.find_process(request.process)
            if isinstance(process, str):
                return Refused(process)
            process.restart()
            return Done(f"{request.process} restarting")
        case AskDown():
            return Done("ending")
        case _:
            assert_never(request)


def _enter(request: AskEntry, world: World, descriptors: list[int]) -> Reply:
    entry = world.find_entry(request.target, request.namespace, request.container, request.argv)
    if isinstance(entry, str):
        return Refused(entry)
    # A user namespace first, where there is one: it gives the rights for the others. The PID namespace takes effect for children only.
    kinds = (["user"] if world.user_namespace else []) + ["mnt", "pid"]
    for path in (*(f"/proc/self/ns/{kind}" for kind in kinds), *map(str, entry.join)):
        descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    return EntryReply(replace(entry, join=tuple(range(len(descriptors))), as_child=True), base_environment())


def _signal(request: AskSignal, world: World) -> Reply:
    found = world.find_processes(request.process, request.part)
    if isinstance(found, str):
        return Refused(found)
    for pid in found:
        try:
            os.kill(pid, request.number)
        except ProcessLookupError:
            continue
    what = request.process if request.part is None else f"{request.process}/{request.part}"
    return Done(f"{what} got {signal.Signals(request.number).name} ({len(found)} process{'' if len(found) == 1 else 'es'})")
