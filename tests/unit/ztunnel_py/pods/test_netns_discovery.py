"""Network namespaces of pods are told from /proc as container runtimes and kernels write it, and nobody else's are taken for them."""

from __future__ import annotations

import os
from ipaddress import ip_address
from pathlib import Path

from ztunnel_py.pods.netns_discovery import here, local_addresses, pod_of_cgroups, scan, start_time

UID = "2d6c54f4-1f49-4d2b-8e3a-0e6b7c1b2a3d"
CONTAINER = "a" * 64
FIB = """\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 10.0.1.0
        /24 link UNICAST
     |-- 10.0.1.7
        /32 host LOCAL
     |-- 10.0.1.255
        /32 link BROADCAST
"""


def test_cgroups_of_either_driver_name_the_pod() -> None:
    assert pod_of_cgroups(f"0::/kubepods/burstable/pod{UID}/{CONTAINER}\n") == UID
    systemd = f"0::/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-{CONTAINER}.scope\n"
    assert pod_of_cgroups(systemd) == UID
    assert pod_of_cgroups("12:cpu:/user.slice\n0::/init.scope\n") is None
    other = UID.replace("2d", "3e")
    assert pod_of_cgroups(f"1:cpu:/kubepods/pod{UID}/x\n2:memory:/kubepods/pod{other}/x\n") is None


def test_a_process_cannot_fake_its_age_by_its_name() -> None:
    assert start_time("7 (a) 1 2 3 (b c) S " + " ".join(str(number) for number in range(4, 53))) == 22
    assert start_time("") is None


def test_only_addresses_of_the_namespace_itself_count() -> None:
    inet6 = "fd000000000000000000000000000005 02 40 00 80 eth0\n"
    assert local_addresses(FIB, inet6) == {ip_address("10.0.1.7"), ip_address("fd00::5")}


def make_process(proc: Path, pid: int, netns: str, *, uid: str = UID, started: int = 5, fib: str = FIB) -> None:
    process = proc / str(pid)
    (process / "ns").mkdir(parents=True)
    (process / "net").mkdir()
    (proc / netns).touch()
    os.link(proc / netns, process / "ns" / "net")
    (process / "cgroup").write_text(f"0::/kubepods/pod{uid}/{CONTAINER}\n" if uid else "0::/\n")
    (process / "stat").write_text(f"{pid} (x) S " + " ".join(["0"] * 18) + f" {started} 0\n")
    (process / "net" / "fib_trie").write_text(fib)


def test_the_oldest_process_with_the_pods_addresses_is_taken(tmp_path: Path) -> None:
    make_process(tmp_path, 1, "host", uid="")
    make_process(tmp_path, 10, "host")
    make_process(tmp_path, 11, "pod", started=9)
    make_process(tmp_path, 12, "pod", started=5)
    make_process(tmp_path, 13, "foreign", started=1, fib="")
    wanted = {UID: (ip_address("10.0.1.7"),)}
    assert scan(tmp_path, wanted) == {UID: tmp_path / "12" / "ns" / "net"}
    assert scan(tmp_path, {}) == {}


def test_paths_of_the_node_are_found_where_the_agent_has_them() -> None:
    def seen(path: str) -> str:
        return str(here(path, proc=Path("/host/proc"), names=Path("/names")))

    assert seen("/var/run/netns/cni-1") == seen("/run/netns/cni-1") == "/names/cni-1"
    assert seen("/proc/77/ns/net") == "/host/proc/77/ns/net"
    assert seen("/somewhere/else") == "/somewhere/else"
