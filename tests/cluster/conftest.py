"""One cluster for all tests here, brought up once; ``CLUSTER=dev`` takes the one that ``make cluster`` keeps up instead."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.figures import Figures
from tests.cluster.harness.client import Cluster, Options, find_cluster, prepare, running_cluster
from tests.cluster.harness.progress import tell
from tests.cluster.mesh import install, remove

_FIGURES = Figures()
_ORDER = (
    "test_end",  # on clusters of its own, while no other takes time
    *("test_cluster", "test_crds", "test_privileges"),  # without a mesh
    *("test_rights", "test_events", "test_faults", "test_mesh", "test_waypoints", "test_rollout", "test_capture"),  # the last takes it down
    *("test_scale", "test_example", "test_manifests", "test_meshctl", "test_certificates"),  # each with one of its own
    *("test_source", "test_trust"),  # on another cluster
)
"""Files in the order in which the mesh is installed and taken down least often. In any other order they pass too."""


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


@pytest.fixture(scope="session")
def control_cluster() -> Iterator[Cluster]:
    """A cluster of their own for tests of the control plane alone: they stop its API server, and publish a root in every namespace."""
    chosen = os.environ.get("CLUSTER")
    if chosen:
        yield find_cluster(chosen)
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES.lines():
        terminalreporter.section("figures")
        for line in _FIGURES.lines():
            terminalreporter.line(line)
