"""``python -m meshctl_py.lab.demo``: bring a lab up, try all claims, and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from meshctl_py.lab.client import Lab, UpOptions, start_lab
from meshctl_py.lab.demo.examples import EXAMPLES
from meshctl_py.lab.demo.mesh import MeshAct
from meshctl_py.lab.demo.report import Report, Unmet
from meshctl_py.lab.demo.stage import Stage, Tap
from meshctl_py.lab.demo.waypoint import WaypointAct
from meshctl_py.lab.demo.wire import Wire
from meshctl_py.lab.home import LabError
from meshctl_py.lab.messages import Failed


def main() -> None:
    """Run the demo; exits with 0 when every claim held."""
    signal.signal(signal.SIGTERM, _interrupt)
    report = Report()
    try:
        with ExitStack() as clean_up:
            _run(report, clean_up)
    except KeyboardInterrupt:
        print("\ninterrupted; everything is removed", file=sys.stderr)
        sys.exit(130)
    except (LabError, Unmet) as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)
    print(f"{report.passed} passed, {report.failed} failed")
    sys.exit(1 if report.failed else 0)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _run(report: Report, clean_up: ExitStack) -> None:
    """Bring up a copy of the example and try all claims. Raises LabError when there is no lab to try them in."""
    report.step("meshctl lab up --copy examples/two-nodes")
    options = UpOptions(tied=True, copy=True, patience=40.0)
    starting = clean_up.enter_context(start_lab(EXAMPLES / "two-nodes", f"demo-{os.getpid()}", options))
    *_, outcome = starting
    if isinstance(outcome, Failed):
        logs = "".join(f"\n  {item.what}: {item.because}\n    " + "\n    ".join(item.tail) for item in outcome.pending)
        raise LabError(f"the lab did not come up: {outcome.because}{logs}")
    report.step("two nodes, a router between them, five pods, a control plane, an agent on each node")
    tap = Tap(Lab(starting.home), "n2")
    clean_up.callback(tap.close)
    stage = Stage(Lab(starting.home), starting.home.copy, report)
    wire = Wire(stage, tap)
    try:
        MeshAct(stage, wire).run()
        WaypointAct(stage, wire).run()
    except Unmet:
        _keep(starting.home.logs)
        raise
    if report.failed:
        _keep(starting.home.logs)


def _keep(logs: Path) -> None:
    kept = tempfile.mkdtemp(prefix="ambient-mesh-demo-logs-")
    shutil.copytree(logs, kept, dirs_exist_ok=True)
    print(f"the logs of this run are kept in {kept}", flush=True)


if __name__ == "__main__":
    main()
