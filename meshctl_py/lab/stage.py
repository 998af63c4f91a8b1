"""What the demo stands on: a report of claims, a tap on the wire, held connections, and a running lab to try claims in."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import msgspec

from meshctl_py.commands.label import apply_labels, labels_of
from meshctl_py.lab.assign import PODS_V4, PODS_V6
from meshctl_py.lab.client import Lab, Popen
from meshctl_py.lab.home import LabError
from meshctl_py.lab.network import interface_name
from meshctl_py.lab.wiretap import Segment, decode_segments

EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
_POLICIES: Final = EXAMPLES / "two-nodes-policies"
SETTLE: Final = 10.0
"""Seconds in which a change of configuration must have taken effect; it takes a fraction of one."""
_COMMAND_WITHIN: Final = 20.0
HELD: Final = 50
_ALIVE: Final = 3
"""Messages that must come back on a connection after it was asked about."""


class Unmet(Exception):
    """A claim that does not hold; the text is what was seen instead."""


class Report:
    """Prints a line a claim, and counts."""

    def __init__(self) -> None:
        self.passed = self.failed = 0
        self._colours = sys.stdout.isatty()
        self._began = time.monotonic()

    def step(self, text: str) -> None:
        """What is being done now."""
        print(self._paint("2", f"[{time.monotonic() - self._began:5.1f} s] {text}"), flush=True)

    def claim(self, text: str, check: Callable[[], str]) -> None:
        """Try a claim: ``check`` returns its evidence, or raises what speaks against it."""
        try:
            evidence = check()
        except (Unmet, LabError, OSError, ValueError, subprocess.SubprocessError) as exc:
            self.failed += 1
            print(f"{self._paint('31', 'FAILED')} {text}: {exc}", flush=True)
        else:
            self.passed += 1
            print(f"{self._paint('32', 'ok')}     {text}: {evidence}", flush=True)

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colours else text


class Tap:
    """Hears all that passes between the router and a node."""

    def __init__(self, lab: Lab, node: str) -> None:
        command = [sys.executable, "-m", "meshctl_py.lab.wiretap", interface_name(node)]
        self._process = lab.open_command("router", command).start(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ask("")

    def hear(self) -> list[Segment]:
        """What passed between pods since the last time."""
        return [segment for segment in decode_segments(self._ask("\n")) if _between_pods(segment)]

    def close(self) -> None:
        _close(self._process)

    def _ask(self, text: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()
        return self._process.stdout.readline()


class _HeldReport(msgspec.Struct, frozen=True):
    """What ``apps/hold.py`` prints."""

    held: int
    broken: list[str]
    echoed: list[int]
    longest_ms: int


class Held:
    """Connections that a pod holds to the echo server, a message on each ten times a second."""

    def __init__(self, lab: Lab) -> None:
        command = ["python3", "apps/hold.py", "server.shop", "7000", str(HELD)]
        self._process = lab.open_command("client", command, namespace="shop").start(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if not self._process.stdout.readline().startswith("holding"):
            raise Unmet(f"{HELD} connections cannot be opened")

    def check(self) -> str:
        """Evidence that all live: from now on a few more messages came back on each. Raises Unmet."""
        before = self._ask()
        deadline = time.monotonic() + SETTLE
        while True:
            seen = self._ask()
            if seen.broken:
                raise Unmet(f"{len(seen.broken)} of {seen.held} broke: {seen.broken[0]}")
            if all(new >= old + _ALIVE for new, old in zip(seen.echoed, before.echoed, strict=True)):
                return f"0 of {seen.held} broke, {sum(seen.echoed)} messages echoed in order, longest wait {seen.longest_ms} ms"
            if time.monotonic() > deadline:
                silent = sum(new < old + _ALIVE for new, old in zip(seen.echoed, before.echoed, strict=True))
                raise Unmet(f"{silent} of {seen.held} fell silent")
            time.sleep(0.1)

    def _ask(self) -> _HeldReport:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=_HeldReport)

    def close(self) -> None:
        _close(self._process)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the claims are tried: a running lab of a copy of the example."""

    lab: Lab
    source: Path
    report: Report

    def run(self, pod: str, *command: str, namespace: str = "shop") -> str:
        """The output of a command in a pod, whatever its exit status."""
        process = self.lab.open_command(pod, command, namespace=namespace).start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=_COMMAND_WITHIN)
        return output.strip()

    def get(self, pod: str, path: str, family: str, *, namespace: str = "shop") -> str:
        """What a pod gets from the server."""
        return self.run(pod, "python3", "apps/get.py", f"http://server.shop{path}", family, namespace=namespace)

    def is_labelled(self, key: str) -> bool:
        """Whether the namespace shop has this label."""
        return key in labels_of(self.source, "Namespace", "", "shop")

    def label(self, text: str) -> None:
        """``meshctl label namespace shop TEXT``."""
        key, equals, value = text.partition("=")
        wanted = {key: value} if equals else {text.removesuffix("-"): None}
        self.report.step(f"meshctl label namespace shop {text}")
        apply_labels(self.source, "Namespace", "", "shop", wanted, overwrite=True)

    def settle(self, seen: Callable[[], bool]) -> bool:
        """Try until something has come true; False if it has not in a time that is more than enough."""
        deadline = time.monotonic() + SETTLE
        while not seen():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def wait_captured(self) -> None:
        """Until the agents have captured all pods of the shop, or a time has passed: the claims that follow tell."""
        self.settle(lambda: all(pod.mesh == "captured" for pod in self.lab.status().pods if pod.namespace == "shop"))

    @contextmanager
    def policy(self, name: str) -> Iterator[None]:
        """A policy is in force as long as the context lasts."""
        self.report.step(f"policy {name}.yaml applied")
        target = self.source / f"{name}.yaml"
        shutil.copy(_POLICIES / target.name, target)
        try:
            yield
        finally:
            target.unlink()

    def address(self, pod: str, family: str) -> str:
        """A pod's address."""
        found = next(item for item in self.lab.status().pods if item.name == pod)
        return next(ip for ip in found.ips if ip_address(ip).version == int(family))

    def log_lines(self, node: str) -> list[str]:
        """The log of a node's agent."""
        return (self.lab.home.logs / f"ztunnel-{node}.log").read_text(errors="replace").splitlines()


def _between_pods(segment: Segment) -> bool:
    return all(end.ip in PODS_V4 or end.ip in PODS_V6 for end in (segment.source, segment.destination))


def _close(process: Popen) -> None:
    """End a helper process by ending its input."""
    try:
        process.communicate(timeout=_COMMAND_WITHIN)
    except (subprocess.TimeoutExpired, OSError):
        process.kill()
        process.wait()
