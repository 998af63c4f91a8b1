"""Log lines for a reader that falls behind, stops, or goes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.telemetry import output
from mesh.telemetry.output import LogOutput

LINE = "x" * 99 + "\n"


class Pipe:
    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 65536)
        os.set_blocking(self.reading, False)
        self.output = LogOutput(self.writing)
        self.blocked = 0
        self.output.when_blocked = self._note

    def _note(self) -> None:
        self.blocked += 1

    def write(self, line: str) -> None:
        self.output.write(line)
        self.output.flush()

    def read(self) -> str:
        pieces = []
        try:
            while piece := os.read(self.reading, 65536):
                pieces.append(piece)
        except BlockingIOError:
            pass
        return b"".join(pieces).decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    os.close(made.reading)
    os.close(made.writing)


def test_a_reader_that_stands_still_blocks_nobody_and_gets_all_later(pipe: Pipe) -> None:
    for _ in range(2000):
        pipe.write(LINE)
    assert pipe.blocked == 1, "somebody has to come back, once"
    pipe.output.try_again()
    assert pipe.blocked == 2
    got = ""
    while more := pipe.read():
        got += more
        pipe.output.flush()
    assert got == LINE * 2000


def test_what_waits_is_bounded_and_what_is_lost_is_counted(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "KEPT_AT_MOST", 10_000)
    for _ in range(2000):
        pipe.write(LINE)
    got = ""
    while more := pipe.read():
        got += more
        pipe.output.flush()
    *lines, last = got.splitlines()
    assert set(lines) == {LINE.rstrip()}
    assert last == f"{2000 - len(lines)} log lines are lost: nobody read them"
    pipe.write(LINE)
    assert pipe.read() == LINE


def test_a_reader_that_goes_costs_the_lines(pipe: Pipe) -> None:
    os.close(pipe.reading)
    for _ in range(2000):
        pipe.write(LINE)
    assert pipe.blocked == 0
    pipe.reading = os.open("/dev/null", os.O_RDONLY)


def test_a_full_disk_costs_the_lines() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    full = LogOutput(fd)
    full.write(LINE)
    full.flush()
    os.close(fd)


def test_a_file_gets_everything_at_once(tmp_path: Path) -> None:
    file = tmp_path / "log"
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    to_file = LogOutput(fd)
    to_file.write(LINE * 100_000)
    to_file.flush()
    os.close(fd)
    assert file.stat().st_size == 10_000_000
