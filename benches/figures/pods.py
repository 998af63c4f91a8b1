"""250 captured pods on a node, each with an identity of its own: memory and descriptors of the agent, and how long enrolling one takes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benches.cpu import cpu_seconds, descriptors, proportional_kib
from benches.rows import OURS, Record, Row
from benches.stage import Broken, Say, agent_of, lab_of, namespace, node, pod
from mesh.kube.objects import ObjectKey
from mesh.kube.overlay import overlay_path
from mesh.model.labels import REDIRECTION
from meshctl_py.lab.client import Lab

FIGURE: Final = "pods"
PODS: Final = 250
STEPS: Final = 5
SINGLES: Final = 10
"""Of them, those that are enrolled one by one, last. More would not fit into the addresses that a lab's node has."""
PATIENCE: Final = 300.0
_SETTLE: Final = 1.0
"""Seconds until the last certificates have come: capture does not wait for them."""
_LOOK_AGAIN: Final = 0.002
_ALONE: Final = "alone"


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    each = (PODS - SINGLES) // STEPS
    with _lab(say, each) as (lab, directory):
        agent = agent_of(lab.home, "n1")
        first = proportional_kib(agent), descriptors(agent)
        _add_size(record, "no pod", *first)
        for step in range(1, STEPS + 1):
            say(f"enrolling pods {each * (step - 1) + 1} to {each * step}")
            before = cpu_seconds(agent)
            took = _enrol(
                lab, directory / _file(step), namespace(_team(step), captured=True), [(_team(step), name) for name in _names(each)]
            )
            record.add(f"enrol {each} at once", "ms/pod", OURS, took * 1e3 / each)
            time.sleep(_SETTLE)
            record.add(f"enrol {each} at once", "cpu ms/pod", OURS, (cpu_seconds(agent) - before) * 1e3 / each)
            _add_size(record, f"{each * step} pods", proportional_kib(agent), descriptors(agent))
        for number, name in enumerate(_names(SINGLES)):
            say(f"enrolling a pod by itself, {number + 1} of {SINGLES}")
            took = _enrol(lab, directory / f"{name}.yaml", _pod(_ALONE, name, captured=True), [(_ALONE, name)])
            record.add("enrol one", "ms", OURS, took * 1e3)
        time.sleep(_SETTLE)
        last = proportional_kib(agent), descriptors(agent)
        _add_size(record, f"{PODS} pods", *last)
        _add_size(record, f"{PODS} pods more than none", last[0] - first[0], last[1] - first[1])
    return record.rows()


@contextmanager
def _lab(say: Say, each: int) -> Iterator[tuple[Lab, Path]]:
    files = {"node.yaml": node("n1"), "alone.yaml": namespace(_ALONE)}
    for step in range(1, STEPS + 1):
        files[_file(step)] = namespace(_team(step))
        files[f"pods-{step}.yaml"] = "".join(_pod(_team(step), name) for name in _names(each))
    for name in _names(SINGLES):
        files[f"{name}.yaml"] = _pod(_ALONE, name)
    with lab_of(say, files, name="pods") as found:
        yield found


def _enrol(lab: Lab, file: Path, text: str, pods: list[tuple[str, str]]) -> float:
    """Write a file that puts pods into the mesh; seconds until the agent says that all are captured. Raises Broken."""
    waiting = [overlay_path(lab.home.status_of("n1"), ObjectKey("Pod", *names)) for names in pods]
    new = file.with_name(f".{file.name}")
    new.write_text(text)
    began = time.monotonic()
    new.rename(file)
    while waiting := [path for path in waiting if not _is_captured(path)]:
        if time.monotonic() - began > PATIENCE:
            raise Broken(f"not captured within {PATIENCE:g} s: {len(waiting)} of {len(pods)} pods")
        time.sleep(_LOOK_AGAIN)
    return time.monotonic() - began


def _is_captured(overlay: Path) -> bool:
    """The agent says so when the rules are in place and read back."""
    try:
        found = json.loads(overlay.read_text())
    except FileNotFoundError:
        return False
    return bool(found["metadata"].get("annotations", {}).get(REDIRECTION) == "enabled")


def _add_size(record: Record, case: str, kib: int, descriptors: int) -> None:
    record.add(case, "MB", OURS, kib * 1024 / 1e6)
    record.add(case, "descriptors", OURS, descriptors)


def _pod(namespace: str, name: str, *, captured: bool = False) -> str:
    return pod(namespace, name, "n1", ["sleep", "infinity"], captured=captured)


def _names(count: int) -> list[str]:
    return [f"app-{number}" for number in range(count)]


def _team(step: int) -> str:
    return f"team-{step}"


def _file(step: int) -> str:
    return f"{_team(step)}.yaml"
