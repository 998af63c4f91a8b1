"""Processes that may use a part of a CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benches import limits
from benches.limits import PERIOD, Controller, NoController, find_controller, limited

V1 = "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V1_OTHER = "35 31 0:32 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"
V2 = "38 31 0:35 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"


def test_the_controller_is_found_where_it_is_mounted() -> None:
    assert find_controller(V1_OTHER + V1 + V2) == Controller(Path("/sys/fs/cgroup/cpu,cpuacct"), v2=False)
    assert find_controller(V2) == Controller(Path("/sys/fs/cgroup/unified"), v2=True)


def test_in_a_container_groups_are_named_from_what_is_mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_container = V2.replace(" / /sys/fs/cgroup/unified ", f" /docker/1 {tmp_path} ")
    controller = find_controller(of_container)
    assert controller == Controller(tmp_path, v2=True, root="/docker/1")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/cgroup.procs").touch()
    said = {"/docker/1/below": tmp_path / "below", "/docker/2": None, "/": None, "/docker/1/unseen": None}
    for group, path in said.items():
        monkeypatch.setattr(Path, "read_text", lambda _, group=group: f"0::{group}\n")
        if path is None:
            with pytest.raises(OSError, match="cannot be seen from here"):
                limits._group_of(controller, 1)
        else:
            assert limits._group_of(controller, 1) == path


def test_who_cannot_be_limited_leaves_the_others_where_they_were() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        groups = Path(f"/proc/{process.pid}/cgroup")
        before = groups.read_text()
        try:
            with pytest.raises(NoController), limited([process.pid, 2**22 + 1], 0.5):
                pass
        finally:
            after = groups.read_text()
            process.kill()
    assert after == before
    assert not list(Path("/sys/fs/cgroup").glob(f"**/ambient-mesh-bench-*-{process.pid}"))


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
