"""100 000 workloads, 10 000 services, 1 000 policies: CPU and memory of loading them, CPU of one change, time to resolve a connection. And
what one change costs a control plane for each of its agents."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benches import listening_agents, served_mesh, synthetic
from benches.cpu import cpu_seconds, resident_kib
from benches.rows import OURS, Record, Row
from benches.stage import Broken, Say, wait_until
from mesh.authz.evaluate import Connection, authorize
from mesh.model.address import SocketAddress
from mesh.state.resolve import resolve
from mesh.state.store import MeshState
from mesh.testing.netns import Netns, namespaces
from mesh.xds.client import TIDY_AFTER

FIGURE: Final = "state"
WORKLOADS: Final = 100_000
SIZES: Final = (100, 10_000, WORKLOADS)
ROUNDS: Final = 3
CHANGES: Final = 100
AGENTS: Final = {1: "its only agent", 50: "each of 50 agents"}
RESOLUTIONS: Final = 5_000
PORT: Final = 15012
READINESS: Final = 15021
PATIENCE: Final = 600.0
_QUIET: Final = 0.5
"""A process that used less than `_LITTLE` CPU in so many seconds has nothing more to do."""
_LITTLE: Final = 0.02


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    _measure_agents(record, say)
    _measure_control_plane(record, say)
    _measure_resolution(record, say)
    return record.rows()


# --- brain and mover


def _measure_agents(record: Record, say: Say) -> None:
    with ExitStack() as stack:
        (netns,) = stack.enter_context(namespaces("bench-state"))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ambient-mesh-bench-")))
        (directory / "source").mkdir()
        _, ask = stack.enter_context(_control_plane(netns, directory))
        for number in range(ROUNDS):
            say(f"round {number + 1} of {ROUNDS}: an agent alone")
            ask(do="have", workloads=0)
            with _agent(netns, directory) as parts:
                empty = {name: cpu_seconds([pid]) for name, pid in parts.items()}
            say(f"round {number + 1} of {ROUNDS}: an agent with {WORKLOADS} workloads")
            ask(do="have", workloads=WORKLOADS)
            with _agent(netns, directory) as parts:
                _add(record, "load", "cpu s", {name: cpu_seconds([pid]) - empty[name] for name, pid in parts.items()})
                for name, pid in parts.items():
                    record.add(f"loaded, {name}", "MB", OURS, resident_kib(pid) * 1024 / 1e6)
                before = {name: cpu_seconds([pid]) for name, pid in parts.items()}
                ask(do="change", times=CHANGES)
                _wait_until_quiet(parts.values())
                changed = {name: (cpu_seconds([pid]) - before[name]) / CHANGES * 1e6 for name, pid in parts.items()}
                _add(record, "one changed endpoint", "cpu us", changed)


def _add(record: Record, case: str, unit: str, parts: Mapping[str, float]) -> None:
    """What each part spent, and the sum."""
    for name, value in parts.items():
        record.add(f"{case}, {name}", unit, OURS, value)
    record.add(f"{case}, together", unit, OURS, sum(parts.values()))


@contextmanager
def _control_plane(netns: Netns, directory: Path) -> Iterator[tuple[int, Callable[..., None]]]:
    """Its process, and what tells it something to do and waits until that is done."""
    command = [sys.executable, "-m", served_mesh.__name__, str(PORT), str(directory)]
    process = netns.run(lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(**command: object) -> None:
        stdin.write(json.dumps(command) + "\n")
        stdin.flush()
        if not stdout.readline():
            raise Broken("the bench's control plane has ended")

    try:
        if not stdout.readline():
            raise Broken("the bench's control plane does not start")
        yield process.pid, ask
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _agent(netns: Netns, directory: Path) -> Iterator[Mapping[str, int]]:
    """An agent that has loaded all there is and rests: the process of its brain and that of its mover."""
    with tempfile.TemporaryDirectory(dir=directory) as own:
        environment = os.environ | {
            "NODE_NAME": "node-1",
            "MESH_SOURCE": str(directory / "source"),
            "MESH_STATUS_DIR": own,
            "RUN_DIR": f"{own}/run",
            "MOVERS": "1",
            "XDS_ADDRESS": f"https://localhost:{PORT}",
            "CA_ADDRESS": f"https://localhost:{PORT}",
            "XDS_ROOT_CA": str(directory / served_mesh.ROOT),
            "CA_ROOT_CA": str(directory / served_mesh.ROOT),
            "AUTH_TOKEN": str(directory / served_mesh.TOKEN),
        }
        log = Path(own, "log")
        with log.open("wb") as output:
            command = [sys.executable, "-m", "ztunnel_py", "proxy"]
            agent = netns.run(lambda: subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output))
        try:
            wait_until(lambda: _is_ready(netns), f"the agent is ready; it says: {log.read_text()[-2000:]}", PATIENCE)
            parts = _parts(Path(own, "run"))
            _wait_until_quiet(parts.values())
            time.sleep(TIDY_AFTER + _QUIET)
            yield parts
        finally:
            agent.terminate()
            agent.wait(PATIENCE)


def _is_ready(netns: Netns) -> bool:
    command = ["curl", "-sf", "-o", os.devnull, f"http://127.0.0.1:{READINESS}/healthz/ready"]
    return netns.run(lambda: subprocess.run(command, check=False, timeout=PATIENCE)).returncode == 0


def _parts(run_dir: Path) -> dict[str, int]:
    (path,) = run_dir.glob("*/mover-0.pid")  # an agent has a part of its own in the run directory
    mover = int(path.read_text())
    stat = Path(f"/proc/{mover}/stat").read_text()
    return {"brain": int(stat.rpartition(")")[2].split()[1]), "mover": mover}


def _wait_until_quiet(pids: Collection[int]) -> None:
    deadline = time.monotonic() + PATIENCE
    before = cpu_seconds(pids)
    while True:
        time.sleep(_QUIET)
        now = cpu_seconds(pids)
        if now - before < _LITTLE:
            return
        if time.monotonic() > deadline:
            raise Broken(f"the agent does not come to rest within {PATIENCE:g} s")
        before = now


# --- the control plane


def _measure_control_plane(record: Record, say: Say) -> None:
    with ExitStack() as stack:
        (netns,) = stack.enter_context(namespaces("bench-state"))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ambient-mesh-bench-")))
        pid, ask = stack.enter_context(_control_plane(netns, directory))
        ask(do="have", workloads=SIZES[0])
        for count, whom in AGENTS.items():
            say(f"what a control plane spends on {whom}")
            with _listening(netns, directory, count):
                for _ in range(ROUNDS):
                    before = cpu_seconds([pid])
                    ask(do="change", times=CHANGES)
                    cost = (cpu_seconds([pid]) - before) / CHANGES / count
                    record.add(f"one changed endpoint, control plane for {whom}", "cpu us", OURS, cost * 1e6)


@contextmanager
def _listening(netns: Netns, directory: Path, count: int) -> Iterator[None]:
    """So many agents that have all there is."""
    command = [sys.executable, "-m", listening_agents.__name__, str(PORT), str(directory), str(count)]
    process = netns.run(lambda: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise Broken("the bench's agents have ended")
        yield
    finally:
        process.communicate()


# --- one connection


def _measure_resolution(record: Record, say: Say) -> None:
    """In this process: what a mover asks its state for a connection, outbound and inbound, of destinations chosen by chance."""
    states = {}
    for size in SIZES:
        say(f"resolution with {size} workloads")
        states[size] = MeshState("node-1")
        states[size].apply(synthetic.mesh(size))
    for number in range(ROUNDS + 2):
        for size, state in states.items():
            record.add(f"resolve one connection, {size} workloads", "cpu us", OURS, _resolution_seconds(state, size, seed=number) * 1e6)


def _resolution_seconds(state: MeshState, size: int, seed: int) -> float:
    rng = random.Random(seed)
    source = state.find_workload(synthetic.workload(0).uid)
    assert source is not None
    # As on a node: it speaks to some services again and again, wherever in the mesh they are.
    services = [rng.randrange(size // synthetic.PER_SERVICE) for _ in range(100)]
    targets = [synthetic.virtual_address(rng.choice(services)) for _ in range(RESOLUTIONS)]
    asked = Connection(source.addresses[0], source.identity, SocketAddress(source.addresses[0], 8080))
    for target in targets:
        resolve(state, source, target, rng)
    began = time.process_time()
    for target in targets:
        resolve(state, source, target, rng)
        authorize(state.policies_for(source), asked)
    return (time.process_time() - began) / RESOLUTIONS
