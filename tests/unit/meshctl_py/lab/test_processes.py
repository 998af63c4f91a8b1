"""Processes of a lab: real ones, in no namespace of their own."""

from __future__ import annotations

from pathlib import Path

import trio

from meshctl_py.lab.enter import Entry
from meshctl_py.lab.processes import LabProcess

SLOW_TO_END = "trap 'while [ ! -e enough ]; do sleep 0.02; done; exit 0' TERM; echo > started; while :; do sleep 0.02; done"


async def until(process: LabProcess, state: str) -> None:
    with trio.fail_after(30):
        while process.status.state != state:
            await process.status_changed.wait()


def test_a_process_that_is_told_to_restart_is_not_running_before_it_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        process = LabProcess("app", tmp_path / "log", lambda: None)
        entry = Entry(("sh", "-c", SLOW_TO_END), directory=str(tmp_path))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: process.run_for_ever(entry, {"PATH": "/usr/bin:/bin"}, grace=5))
            await until(process, "running")
            first = process.status
            with trio.fail_after(30):
                while not (tmp_path / "started").exists():  # noqa: ASYNC110 - another process makes the file
                    await trio.sleep(0.02)
            process.restart()
            assert (process.status.state, process.status.pid) == ("ending", first.pid)
            (tmp_path / "enough").touch()
            await until(process, "running")
            assert (process.status.starts, process.status.last_exit) == (2, "exit status 0")
            assert process.status.pid != first.pid
            nursery.cancel_scope.cancel()

    trio.run(main)
