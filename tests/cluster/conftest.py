"""One cluster for all tests here, brought up once; ``CLUSTER=dev`` takes the one that ``make cluster`` keeps up instead."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.harness.client import Cluster, Options, find_cluster, running_cluster
from tests.cluster.harness.progress import tell


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    chosen = os.environ.get("CLUSTER")
    if chosen:
        found = find_cluster(chosen)
        found.load_project()
        yield found
    else:
        with running_cluster(f"test-{os.getpid()}", Options(), tell) as started:
            yield started
