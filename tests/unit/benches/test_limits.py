"""Processes that may use a part of a CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benches.limits import PERIOD, Controller, NoController, find_controller, limited

V1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V1_OTHER = "35 31 0:32 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"
V2 = "38 31 0:35 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def test_the_controller_is_found_where_it_is_mounted() -> None:
    assert find_controller(V1_OTHER + V1 + V2) == Controller(Path("/sys/fs/cgroup/cpu,cpuacct"), v2=False)
    assert find_controller(V2) == Controller(Path("/sys/fs/cgroup/unified"), v2=True)


def test_a_machine_without_the_controller_says_so() -> None:
    with pytest.raises(NoController, match="none is mounted"):
        find_controller("22 1 0:20 / /proc rw - proc proc rw\n" + V1_OTHER)


def test_both_versions_are_told_the_same_part_of_a_cpu() -> None:
    assert Controller(Path("/"), v2=True).quota(0.25) == {"cpu.max": f"{PERIOD // 4} {PERIOD}"}
    assert Controller(Path("/"), v2=False).quota(0.25) == {"cpu.cfs_period_us": f"{PERIOD}", "cpu.cfs_quota_us": f"{PERIOD // 4}"}


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_limited_process_is_back_where_it_was_in_the_end(interrupted: bool) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        groups = Path(f"/proc/{process.pid}/cgroup")
        before = groups.read_text()
        try:
            with limited([process.pid], 0.5):
                name = next(line for line in groups.read_text().splitlines() if "ambient-mesh-bench-" in line).rpartition("/")[2]
                if interrupted:
                    raise KeyboardInterrupt
        except NoController as exc:
            pytest.skip(str(exc))
        except KeyboardInterrupt:
            assert interrupted
        finally:
            after = groups.read_text()
            process.kill()
    assert after == before
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{name}"))
