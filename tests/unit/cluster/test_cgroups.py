"""Which control group hierarchies a machine has, from its mount table."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.harness import cgroups
from tests.cluster.harness.cgroups import Hierarchy, find_hierarchies

SEPARATE = """\
28 25 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
29 28 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
30 28 0:30 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
37 28 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/lib/systemd/agent,name=systemd
38 28 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
JOINED = "29 28 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:4 - cgroup cgroup rw,cpu,cpuacct\n"
UNIFIED = "28 25 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"


def test_hierarchies_of_version_1_are_taken_where_there_are_some_and_named_by_what_mounts_them() -> None:
    assert find_hierarchies(SEPARATE) == (
        Hierarchy(Path("/sys/fs/cgroup/cpu"), "cpu"),
        Hierarchy(Path("/sys/fs/cgroup/memory"), "memory"),
        Hierarchy(Path("/sys/fs/cgroup/systemd"), "none,name=systemd"),
    )


def test_controllers_mounted_together_are_one_hierarchy() -> None:
    assert find_hierarchies(JOINED) == (Hierarchy(Path("/sys/fs/cgroup/cpu,cpuacct"), "cpu,cpuacct"),)


def test_the_unified_hierarchy_is_taken_where_there_is_no_other() -> None:
    (only,) = find_hierarchies(UNIFIED)
    assert only.mount == Path("/sys/fs/cgroup")
    assert only.unified


def test_a_hierarchy_mounted_twice_counts_once() -> None:
    assert len(find_hierarchies(JOINED + JOINED.replace("/sys/fs/cgroup", "/mnt"))) == 1


def test_a_cluster_may_end_while_another_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one takes the common parent away."""
    monkeypatch.setattr(cgroups, "find_hierarchies", lambda: (Hierarchy(tmp_path, "cpu"),))

    def come_and_go(cluster: str) -> None:
        for _ in range(300):
            cgroups.make_group(cluster, "n1")
            assert cgroups.remove_groups(cluster) == []

    with ThreadPoolExecutor() as pool:
        list(pool.map(come_and_go, ("one", "two")))
    assert list(tmp_path.iterdir()) == []
