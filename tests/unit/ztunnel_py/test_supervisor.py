"""The supervisor with real processes in the place of brains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = "import sys; from ztunnel_py.supervisor import Supervisor; sys.exit(Supervisor([sys.executable, '-c', sys.argv[1]]).run())"


def start(brain: str, directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, brain],
        env=os.environ | {"DIR": str(directory), "RUN_DIR": str(directory / "run")},
        stderr=subprocess.PIPE,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return path.read_text()
        assert process.poll() is None, "the supervisor has ended"
        time.sleep(0.01)
    raise AssertionError(f"{path} was never written")


def test_a_killed_brain_is_started_again_and_sigterm_reaches_it(tmp_path: Path) -> None:
    brain = """
import os, pathlib, signal, sys, time
here = pathlib.Path(os.environ["DIR"])
signal.signal(signal.SIGTERM, lambda *_: (here.joinpath("stopped").write_text("yes"), sys.exit(0)))
here.joinpath("second" if here.joinpath("first").exists() else "first").write_text(str(os.getpid()))
time.sleep(60)
"""
    process = start(brain, tmp_path)
    try:
        os.kill(int(wait_for(tmp_path / "first", process)), signal.SIGKILL)
        wait_for(tmp_path / "second", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert (tmp_path / "stopped").exists()
    finally:
        process.kill()
        process.communicate()


def test_a_brain_that_cannot_start_as_configured_is_not_started_again(tmp_path: Path) -> None:
    process = start("import sys; sys.exit(78)", tmp_path)
    assert process.wait(10) == 78
    process.communicate()


def test_the_lifeline_closes_when_the_supervisor_is_killed_and_not_before(tmp_path: Path) -> None:
    brain = """
import os, pathlib, select, subprocess, sys
here = pathlib.Path(os.environ["DIR"])
fd = int(os.environ["MESH_LIFELINE_FD"])
assert not select.select([fd], [], [], 0)[0]
here.joinpath("up").write_text("yes")
select.select([fd], [], [], 30)
here.joinpath("down").write_text("closed" if os.read(fd, 1) == b"" else "data")
"""
    process = start(brain, tmp_path)
    wait_for(tmp_path / "up", process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while not (tmp_path / "down").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "down").read_text() == "closed"
