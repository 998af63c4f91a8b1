"""The example application goes through everything a mesh can bring, and no visitor of it is turned away."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.harness.api import Object, condition, path_of
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.images import PYTHON
from tests.cluster.mesh import (
    REPOSITORY,
    SYSTEM,
    WORKERS,
    captured,
    install,
    label,
    overlay,
    remove,
    rolled_out,
    uninstall,
    wait_released,
    wait_rolled_out,
)
from tests.cluster.workloads import addresses, apply_pods, attempt, echo_pod

NAMESPACE = "bookshop"
EXAMPLE = REPOSITORY / "examples" / NAMESPACE
VISITS = 15
"""How many visitors must have been served between two steps: three seconds' worth."""
REPORT = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


@pytest.fixture
def shop(cluster: Cluster, tmp_path: Path) -> Iterator[Shop]:
    """Open, before there is a mesh."""
    remove(cluster, tmp_path / "deploy")
    overlay(tmp_path / "shop", EXAMPLE, {"docker.io/library/python": PYTHON})
    cluster.kubectl("apply", "-k", str(tmp_path / "shop"))
    shop = Shop(cluster)
    shop.wait_open()
    yield shop
    cluster.kubectl("delete", "-k", str(tmp_path / "shop"), "--wait=true")


class Shop:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._opened = 0.0

    def open(self) -> None:
        """From here on nobody may be turned away."""
        self._opened = time.time()

    def pods(self, app: str | None = None) -> list[Object]:
        """Those that run."""
        found = self._cluster.api.list("Pod", NAMESPACE, **({"labelSelector": f"app={app}"} if app else {}))
        return [pod for pod in found if pod["status"]["phase"] == "Running"]

    def wait_open(self) -> None:
        def ready() -> bool:
            pods = self.pods()
            return len(pods) == 9 and all(condition(pod, "Ready") for pod in pods)

        wait_until(ready, "all pods of the shop are ready", 120)
        wait_until(lambda: self.report()["served"] > VISITS, "the first visitors are served")

    def report(self) -> dict[str, Any]:
        """From the network of the visitors' pod itself: neither mesh nor API server are in between."""
        (visitors,) = self.pods("visitors")
        text = self._cluster.in_pod(visitors, sys.executable, "-c", REPORT, "http://127.0.0.1:8080/report")
        found: dict[str, Any] = json.loads(text)
        return found

    def go_on(self, step: str) -> None:
        """Until some more visitors were served after a step. Fails if any was turned away since the shop opened."""
        start = self.report()["served"]
        wait_until(lambda: self.report()["served"] >= start + VISITS, f"{VISITS} more visitors are served after {step}")
        came = [failure for failure in self.report()["failed"] if failure["at"] > self._opened]
        failed = [{**failure, "at": round(failure["at"] - self._opened, 1)} for failure in came]
        assert failed == [], f"turned away by the end of {step}, which is {time.time() - self._opened:.1f} s after the opening"

    def restarts(self) -> int:
        return sum(status["restartCount"] for pod in self.pods() for status in pod["status"]["containerStatuses"])


def test_an_application_runs_through_install_label_strict_deny_upgrade_unlabel_and_uninstall(
    cluster: Cluster, shop: Shop, tmp_path: Path
) -> None:
    shop.open()
    shop.go_on("opening")
    install(cluster, tmp_path / "deploy")
    shop.go_on("install")
    label(cluster, NAMESPACE)
    wait_until(lambda: all(map(captured, shop.pods())), "all pods are captured")
    shop.go_on("label")
    cluster.kubectl("apply", "-f", str(EXAMPLE / "policies/strict.yaml"))
    (database, _) = sorted(shop.pods("database"), key=lambda pod: str(pod["metadata"]["name"]))
    with cluster.namespace("burglar") as outside:
        burglar = apply_pods(cluster, outside, echo_pod("burglar", "n1"))["burglar"]
        wait_until(lambda: attempt(cluster, burglar, addresses(database)[0], 5000) != "READY", "plaintext is refused")
    shop.go_on("STRICT")
    cluster.kubectl("apply", "-f", str(EXAMPLE / "policies/database.yaml"))
    (frontend, *_) = shop.pods("frontend")
    wait_until(lambda: attempt(cluster, frontend, addresses(database)[0], 5000) != "READY", "who has no business there is refused")
    shop.go_on("deny")
    upgrade(cluster)
    shop.go_on("upgrade")
    for name in ("database", "strict"):
        cluster.kubectl("delete", "-f", str(EXAMPLE / f"policies/{name}.yaml"))
    # Agents hear of labels from the API server and of policies from the control plane. Who is released while STRICT still holds at the
    # other end speaks plaintext there, and is refused.
    with cluster.namespace("guest") as outside:
        guest = apply_pods(cluster, outside, echo_pod("guest", "n1"))["guest"]
        for pod in shop.pods("database"):
            wait_until(lambda pod=pod: attempt(cluster, guest, addresses(pod)[0], 5000) == "READY", "plaintext is taken again")
    label(cluster, NAMESPACE, None)
    wait_released(cluster, NAMESPACE)
    shop.go_on("un-label")
    uninstall(cluster, tmp_path / "deploy")
    shop.go_on("uninstall")
    assert shop.restarts() == 0, "no probe failed for long"


def upgrade(cluster: Cluster) -> None:
    """What a new version is to Kubernetes: another template."""
    stamp = {"spec": {"template": {"metadata": {"annotations": {"upgraded": str(time.time())}}}}}
    for kind, name in WORKERS:
        cluster.api.patch(path_of(kind, name, SYSTEM), stamp)
    wait_until(lambda: not rolled_out(cluster, "DaemonSet", "ztunnel"), "the roll-out begins")
    wait_rolled_out(cluster, 240)
