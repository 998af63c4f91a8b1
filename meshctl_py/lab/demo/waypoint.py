"""The second act: a waypoint is put before the services of the namespace, does what it is for, and is taken away."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

from mesh.model.labels import USE_WAYPOINT
from meshctl_py.lab.client import Popen
from meshctl_py.lab.demo.report import Unmet
from meshctl_py.lab.demo.requests import RequestClaims, visiting
from meshctl_py.lab.demo.stage import Stage
from meshctl_py.lab.demo.wire import Wire
from meshctl_py.lab.status import PodStatus

_VERSIONS: Final = ("web-v1", "web-v2")
_REPLICAS: Final = ("waypoint-0", "waypoint-1")
"""As the lab names the pods of a Deployment."""


class WaypointAct:
    """The claims, in the order in which a user would come upon them."""

    def __init__(self, stage: Stage, wire: Wire) -> None:
        self._stage = stage
        self._wire = wire
        self._shop = LabShop(stage)

    def run(self) -> None:
        report = self._stage.report
        with self._stage.applied("two-nodes-waypoint/versions.yaml"):
            self._stage.settle(lambda: all(self._shop.is_ready(name) for name in _VERSIONS))
            self._stage.wait_captured()
            self._wire.forget()
            report.claim("a waypoint is a command away", self._apply)
            report.claim_both("requests pass it, it knows what they ask for, and the link carries only TLS", self._passed)
            RequestClaims(self._shop, report).run()
            report.claim("the waypoint is taken away under load without a failed request", self._leave)
            report.claim_both("then requests go directly, and the server sees the client's own address", self._stage.sees_own_address)

    def _apply(self) -> str:
        lines = self._stage.meshctl("waypoint", "apply", "-n", "shop", "--enroll-namespace", "--wait").splitlines()
        return ", ".join(line.removeprefix("✅ ") for line in lines[1:])

    def _passed(self, family: str) -> str:
        waypoint = self._stage.address(_REPLICAS[0], family)
        heard = self._wire.encrypted(family, expected=lambda answer: answer.startswith(f"200 hello {waypoint},"))
        line = self._find_line(f"/secret-recipe-{family}")
        if (request := re.search(r'"GET [^"]*" 200', line)) is None:
            raise Unmet(f"the waypoint's access log: {line}")
        return f"{heard}; log of {_REPLICAS[0]}: {request[0]}; the server sees {waypoint}, which is {_REPLICAS[0]}"

    def _find_line(self, path: str) -> str:
        """Of the waypoint's access log, for a request of this path."""
        found: list[str] = []

        def seen() -> bool:
            found[:] = [line for line in self._shop.read_log(_REPLICAS[0]) if path in line]
            return bool(found)

        if not self._stage.settle(seen):
            raise Unmet(f"the waypoint's access log has no request of {path}")
        return found[-1]

    def _leave(self) -> str:
        """In this order: agents go directly before the waypoint ends."""
        with visiting(self._shop) as visitors:
            self._stage.label(f"{USE_WAYPOINT}-")
            said = self._stage.meshctl("waypoint", "delete", "waypoint", "-n", "shop")
            if not self._stage.settle(lambda: self._shop.find_pod(_REPLICAS[0]) is None):
                raise Unmet("the waypoint's pod stays")
            return f"{said}; {visitors.check()}"


class LabShop:
    """The shop in a lab, where claims about requests are tried: a `requests.Shop`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def run(self, pod: str, *command: str) -> str:
        return self._stage.run(pod, *command)

    def start(self, pod: str, *command: str) -> Popen:
        return self._stage.start(pod, *command)

    def applied(self, file: str, **values: str) -> AbstractContextManager[None]:
        return self._stage.applied(file, **values)

    def settle(self, seen: Callable[[], bool]) -> bool:
        return self._stage.settle(seen)

    def waypoint_logs(self) -> Mapping[str, Sequence[str]]:
        return {name: self.read_log(name) for name in _REPLICAS if self.is_ready(name)}

    def replace_waypoints(self) -> str:
        for name in _REPLICAS:
            before = self._restarts(name)
            self._stage.report.step(f"meshctl lab restart shop/{name}")
            self._stage.lab.restart(f"shop/{name}")
            if not self._stage.settle(partial(self._is_back, name, before)):
                raise Unmet(f"{name} does not come back")
        return f"{' and '.join(_REPLICAS)} ended on SIGTERM and came back"

    def _is_back(self, name: str, before: int) -> bool:
        return self.is_ready(name) and self._restarts(name) > before

    def _restarts(self, name: str) -> int:
        pod = self.find_pod(name)
        return pod.restarts if pod is not None else 0

    def is_ready(self, name: str) -> bool:
        pod = self.find_pod(name)
        return pod is not None and pod.ready

    def find_pod(self, name: str) -> PodStatus | None:
        return next((pod for pod in self._stage.lab.status().pods if (pod.namespace, pod.name) == ("shop", name)), None)

    def read_log(self, name: str) -> list[str]:
        """Of a pod of the waypoint."""
        return self._stage.read_log(f"shop_{name}_istio-proxy")
