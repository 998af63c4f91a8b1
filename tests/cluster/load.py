"""A load that notices everything: connections held with a number to and fro, and new ones all the time.

    python3 load.py serve PORT
    python3 load.py drive HOST PORT HELD RATE

Standard library only, for any pod. ``drive`` prints one JSON object a line: ``{"held": 50}`` once all are open, then ``{"tick": ...}``
with the totals ten times a second, and between them ``{"lost": ...}`` and ``{"refused": ...}`` with the time and the reason of each.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

PATIENCE = 10.0
"""Seconds an answer may take; what takes longer is lost, or refused."""
BEAT = 0.1
SIZE = 8


async def serve(port: int) -> None:
    """An echo server on all addresses."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError:
            writer.close()  # the client broke off, which is its right

    async with await asyncio.start_server(echo, ["0.0.0.0", "::"], port, backlog=512) as server:
        await server.serve_forever()


class Drive:
    """Counts what it sees; times are seconds of the wall clock, so that those of other processes compare."""

    def __init__(self, host: str, port: int, held: int, rate: float) -> None:
        self._where = (host, port)
        self._wanted = held
        self._pause = 1 / rate if rate else None
        self._opened = 0
        self._answered = 0
        self._refused = 0
        self._lost = 0
        self._open = asyncio.Event()

    async def run(self) -> None:
        holding = [asyncio.create_task(self._hold()) for _ in range(self._wanted)]
        if self._wanted:
            await self._open.wait()
        tell(held=self._wanted, lost_early=self._lost)
        coming = asyncio.create_task(self._come())
        while True:
            await asyncio.sleep(BEAT)
            tell(tick=time.time(), answered=self._answered, refused=self._refused, alive=self._wanted - self._lost, lost=self._lost)
            for task in (*holding, coming):
                if task.done() and task.exception():
                    raise task.exception() or AssertionError

    async def _hold(self) -> None:
        number, began = 0, time.time()
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*self._where), PATIENCE)
            while True:
                await self._trip(reader, writer, number)
                number += 1
                if number == 1:
                    self._opened += 1
                    if self._opened + self._lost >= self._wanted:
                        self._open.set()
                await asyncio.sleep(BEAT)
        except (OSError, EOFError, TimeoutError, ValueError) as exc:
            self._lost += 1
            tell(lost=time.time(), because=f"{type(exc).__name__}: {exc}", trips=number, lived=round(time.time() - began, 2))
            if self._opened + self._lost >= self._wanted:
                self._open.set()

    async def _come(self) -> None:
        """New connections at an even rate, none waiting for another."""
        if self._pause is None:
            return
        due, tasks = time.monotonic(), set[asyncio.Task[None]]()
        while True:
            task = asyncio.create_task(self._once())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += self._pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _once(self) -> None:
        began = time.time()
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*self._where), PATIENCE)
            await self._trip(reader, writer, self._answered)
            writer.close()
            self._answered += 1
        except (OSError, EOFError, TimeoutError, ValueError) as exc:
            self._refused += 1
            tell(refused=began, took=round(time.time() - began, 3), because=f"{type(exc).__name__}: {exc}")

    async def _trip(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        message = f"{number % 10**SIZE:0{SIZE}d}".encode()
        writer.write(message)
        got = await asyncio.wait_for(reader.readexactly(SIZE), PATIENCE)
        if got != message:
            raise ValueError(f"sent {message!r}, got {got!r}")


def tell(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def main(arguments: list[str]) -> None:
    if arguments[0] == "serve":
        asyncio.run(serve(int(arguments[1])))
    host, port, held, rate = arguments[1:]
    asyncio.run(Drive(host, int(port), int(held), float(rate)).run())


if __name__ == "__main__":
    main(sys.argv[1:])
