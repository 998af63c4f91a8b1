"""One cluster for all tests that a process runs here, brought up once: workers of pytest-xdist have one each, side by side. ``CLUSTER=dev``
takes the one that ``make cluster`` keeps up instead; then there can be no workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cluster.figures import Figures
from tests.cluster.harness.client import Cluster, Options, find_cluster, prepare, running_cluster
from tests.cluster.harness.progress import tell
from tests.cluster.mesh import install, remove

_FIGURES = Figures()
_MEASURED: Final = "figures"
_ORDER = (
    *("test_end", "test_source", "test_trust"),  # on clusters of their own, while no other takes time
    *("test_certificates", "test_capture", "test_rollout", "test_events", "test_faults", "test_waypoints", "test_rights", "test_mesh"),
    *("test_meshctl", "test_scale", "test_example", "test_manifests", "test_cluster", "test_crds", "test_privileges"),
)
"""Files in an order in which the mesh is seldom installed and taken down, and short ones come last: workers take the next as they become
free, and should end together. In any other order they pass too."""


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CLUSTER") and config.getoption("numprocesses", None):
        raise pytest.UsageError("CLUSTER is one cluster, and workers need one each: no -n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return _ORDER.index(name) if item.path.parent == Path(__file__).parent and name in _ORDER else -1

    items.sort(key=place)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    chosen = os.environ.get("CLUSTER")
    if chosen:
        found = find_cluster(chosen)
        remove(found, tmp_path_factory.mktemp("deploy"))  # or its pods would go on with the image they have
        found.load_project()
        yield found
    else:
        parts = prepare()  # what takes minutes is no part of the time
        began = time.monotonic()
        with running_cluster(f"test-{os.getpid()}", Options(), tell) as started:
            _FIGURES.note(f"a cluster of Kubernetes {parts[0].version} with two nodes, up", f"{time.monotonic() - began:.1f} s")
            yield started


@pytest.fixture(scope="module")
def control_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of their own for tests of the control plane alone: they stop its API server, and publish a root in every namespace. Each
    file has one, since one that stayed up would take time from all files after them."""
    chosen = os.environ.get("CLUSTER")
    if chosen:
        found = find_cluster(chosen)
        remove(found, tmp_path_factory.mktemp("deploy"))
        yield found
    else:
        with running_cluster(f"control-{os.getpid()}", Options(project=False), tell) as started:
            yield started


@pytest.fixture(scope="module")
def mesh(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster with the mesh of deploy/ on it: installed unless an earlier test has left it there."""
    install(cluster, tmp_path_factory.mktemp("deploy"))
    return cluster


@pytest.fixture(scope="session")
def figures() -> Figures:
    return _FIGURES


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist has no terminal: it hands over what it measured."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_MEASURED] = _FIGURES.parts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _FIGURES.add(*getattr(node, "workeroutput", {}).get(_MEASURED, ((), ())))  # of one that was killed there are none


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES.lines():
        terminalreporter.section("figures")
        for line in _FIGURES.lines():
            terminalreporter.line(line)
