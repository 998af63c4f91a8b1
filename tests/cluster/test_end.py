"""However a cluster ends, nothing of it is left: no process, no network namespace, no mount, no control group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshctl_py.lab.processes import descendants
from tests.cluster.harness.client import Cluster, find_cluster, wait_until
from tests.cluster.harness.home import cache_directory

STARTER = """
import signal, sys, time
from tests.cluster.harness.client import Options, running_cluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would we
with running_cluster(sys.argv[1], Options(nodes=1, project=False), lambda text: None):
    print("up", flush=True)
    time.sleep(600)
"""


def interrupt(starter: subprocess.Popen[str], _cluster: Cluster) -> None:
    starter.send_signal(signal.SIGINT)


def terminate(starter: subprocess.Popen[str], _cluster: Cluster) -> None:
    starter.terminate()


def kill_the_starter(starter: subprocess.Popen[str], _cluster: Cluster) -> None:
    starter.kill()


def kill_process_1(_starter: subprocess.Popen[str], cluster: Cluster) -> None:
    os.kill(int(cluster.home.pid.read_text()), signal.SIGKILL)


def kill_the_undertaker_and_clean_up_later(starter: subprocess.Popen[str], cluster: Cluster) -> None:
    starter.kill()
    os.kill(int(cluster.home.undertaker.read_text()), signal.SIGKILL)
    assert cluster.home.wait_until_gone(20)
    subprocess.run([sys.executable, "-m", "tests.cluster.harness", "down"], check=True)


@pytest.mark.parametrize(
    "end", [interrupt, terminate, kill_the_starter, kill_process_1, kill_the_undertaker_and_clean_up_later], ids=lambda end: end.__name__
)
def test_nothing_of_a_cluster_is_left_when_it_ends_by(end: Callable[[subprocess.Popen[str], Cluster], None]) -> None:
    name = f"end-{os.getpid()}-{end.__name__[:12].replace('_', '-').strip('-')}"
    with subprocess.Popen([sys.executable, "-c", STARTER, name], stdout=subprocess.PIPE, text=True) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline() == "up\n"
            cluster = find_cluster(name)
            processes = {int(cluster.home.undertaker.read_text())}
            processes |= set(descendants(int(cluster.home.undertaker.read_text())))
            namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in processes} - {os.readlink("/proc/self/ns/net")}
            assert len(namespaces) >= 3, "the router's, the node's, and that of the DNS pod"
            assert list(Path("/sys/fs/cgroup").glob(f"**/ambient-mesh/{name}"))
            end(starter, cluster)
            wait_until(lambda: not cluster.home.alive, "the cluster's processes have ended")
        finally:
            starter.kill()
    wait_until(lambda: not {pid for pid in processes if Path(f"/proc/{pid}").exists()}, "no process is left")
    wait_until(lambda: not namespaces & namespaces_in_use(), "no network namespace is left")
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    assert not list(Path("/sys/fs/cgroup").glob(f"**/ambient-mesh/{name}"))
    left = {path.name for path in (cache_directory() / "run" / name).iterdir()}
    assert left == {"lock", "logs"}


def namespaces_in_use() -> set[str]:
    found: set[str] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                found.add(os.readlink(entry / "ns/net"))
            except OSError:
                continue
    return found
