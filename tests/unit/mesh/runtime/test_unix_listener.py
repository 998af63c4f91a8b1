"""Unix listeners: private from the first moment, and handed on without a gap."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from mesh.runtime.http import BindError, Request, Response, Route, serve_admin, unix_listener


async def ask(path: Path) -> str:
    stream = await trio.open_unix_socket(path)
    async with stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = b"".join([part async for part in stream])
    return answer.partition(b"\r\n\r\n")[2].decode().strip()


def test_a_new_listener_succeeds_the_old_one_which_finishes_what_it_began(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "run" / "x.sock"
        go_on = trio.Event()

        async def slow(request: Request) -> Response:
            await go_on.wait()
            return Response.text("old")

        async def quick(request: Request) -> Response:
            return Response.text("new")

        answers: list[str] = []

        async def ask_old() -> None:
            answers.append(await ask(path))

        async with trio.open_nursery() as nursery:
            with ExitStack() as stack:
                await nursery.start(serve_admin, {"/": Route(slow)}, [stack.enter_context(unix_listener(path))])
                assert path.stat().st_mode & 0o777 == 0o600
                nursery.start_soon(ask_old)
                await trio.testing.wait_all_tasks_blocked()
                await nursery.start(serve_admin, {"/": Route(quick)}, [stack.enter_context(unix_listener(path))])
                assert await ask(path) == "new"
                go_on.set()
                while not answers:
                    await trio.testing.wait_all_tasks_blocked()
                assert answers == ["old"]
                assert [entry.name for entry in path.parent.iterdir()] == ["x.sock"]
                nursery.cancel_scope.cancel()

    with_timeout(main)


def test_a_place_that_cannot_be_listened_at_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "file").touch()
        await trio.lowlevel.checkpoint()
        with pytest.raises(BindError, match=r"file/x\.sock"), unix_listener(tmp_path / "file" / "x.sock"):
            pass

    with_timeout(main)


def with_timeout(main: object) -> None:
    async def limited() -> None:
        with trio.fail_after(30):
            await main()

    trio.run(limited)
