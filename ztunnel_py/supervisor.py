"""The agent's first process: keeps a brain running, and nothing else, so that nothing else can kill it.

It imports only the standard library and no trio: a few MB that stay. The movers are the brain's children; when the brain dies they
fall to the supervisor (subreaper), which reaps them but leaves them alone: they go on serving and meet the next brain. The read end
of a pipe, the *lifeline*, is inherited by brain and movers; only the supervisor holds the write end, so that its death, however
sudden, reaches all of them and no mover is left without anybody who could stop it. It also holds the file that agents of one node lock
when they are in charge of its pods: the lock lasts from one brain to the next, and is gone when the agent is.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

LIFELINE = "MESH_LIFELINE_FD"
"""Environment variable with the number of the inherited read end."""

CHARGE = "MESH_CHARGE_FD"
"""Environment variable with the number of the open lock file: see `ztunnel_py.brain.charge`."""

DEFAULT_RUN_DIR = "/run/ztunnel-py"

EXIT_CONFIG = 78
"""Exit status (EX_CONFIG of sysexits.h) of a brain that can't start as configured: a restart would not help."""

_NOT_STARTED = 71
"""EX_OSERR of sysexits.h."""
_PR_SET_CHILD_SUBREAPER = 36
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 5.0
_STEADY = 10.0
"""A brain that lived so many seconds starts the pauses anew."""


class Supervisor:
    """Runs ``ztunnel-py brain`` until told to stop by SIGTERM or SIGINT; `run` returns the agent's exit status."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._stopping = False
        self._brain: subprocess.Popen[bytes] | None = None
        self._pause = _FIRST_PAUSE
        self._lifeline, self._held = os.pipe()
        self._charge = -1

    def run(self) -> int:
        try:
            self._charge = _open_charge(os.environ.get("RUN_DIR", DEFAULT_RUN_DIR))
        except OSError as exc:
            _say(f"RUN_DIR can't be used: {exc}")
            return EXIT_CONFIG
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        while True:
            started = time.monotonic()
            status = self._run_brain()
            if self._stopping or status in (0, EXIT_CONFIG):
                return max(status, 0)
            if time.monotonic() - started > _STEADY:
                self._pause = _FIRST_PAUSE
            _say(f"brain ended with status {status}; starting another in {self._pause:g} s")
            time.sleep(self._pause)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)

    def _run_brain(self) -> int:
        environment = os.environ | {LIFELINE: str(self._lifeline), CHARGE: str(self._charge)}
        try:
            self._brain = subprocess.Popen(self._command, env=environment, pass_fds=(self._lifeline, self._charge))
        except OSError as exc:  # no memory or no processes are left: later there may be
            _say(f"the brain can't be started: {exc}")
            return _NOT_STARTED
        if self._stopping:
            self._brain.terminate()
        return self._wait_brain(self._brain)

    def _wait_brain(self, brain: subprocess.Popen[bytes]) -> int:
        """Reap whatever ends until it is the brain: movers of a dead brain end up here too."""
        while True:
            pid, status = os.wait()
            if pid == brain.pid:
                brain.returncode = os.waitstatus_to_exitcode(status)
                return brain.returncode

    def _stop(self, number: int, frame: object) -> None:
        if self._stopping and number == signal.SIGINT:
            os._exit(0)
        self._stopping = True
        if self._brain is not None and self._brain.returncode is None:
            self._brain.send_signal(signal.SIGTERM)


def _open_charge(run_dir: str) -> int:
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    return os.open(os.path.join(run_dir, "charge.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass  # a full disk or a closed pipe must not end who keeps the others alive
