"""However a cluster ends, nothing of it is left: no process, no network namespace, no mount, no control group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import pytest

from mesh.linux.netns import open_netns, run_in_netns
from meshctl_py.lab.processes import descendants
from tests.cluster.harness import cgroups
from tests.cluster.harness.client import Cluster, find_cluster, wait_until
from tests.cluster.harness.home import cache_directory

_SO_NETNS_COOKIE: Final = 71
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
    subprocess.run([sys.executable, "-m", "tests.cluster.harness", "down", "--name", cluster.name], check=True)


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
            namespaces = network_namespaces(processes) - network_namespaces([os.getpid()])
            assert len(namespaces) >= 3, "the router's, the node's, and that of the DNS pod"
            assert control_groups(name)
            end(starter, cluster)
            wait_until(lambda: not cluster.home.alive, "the cluster's processes have ended")
        finally:
            starter.kill()
    wait_until(lambda: not {pid for pid in processes if Path(f"/proc/{pid}").exists()}, "no process is left")
    wait_until(lambda: not namespaces & network_namespaces(running()), "no network namespace is left")
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    assert not control_groups(name)
    left = {path.name for path in (cache_directory() / "run" / name).iterdir()}
    assert left == {"lock", "logs"}


def running() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def network_namespaces(pids: Iterable[int]) -> set[int]:
    """Those of the processes that live, each by what no later one will have; an inode's number is soon another's."""
    found: dict[str, int] = {}
    for pid in pids:
        path = f"/proc/{pid}/ns/net"
        try:
            inode = os.readlink(path)
            if inode not in found:
                namespace = open_netns(path)
                try:
                    found[inode] = run_in_netns(namespace, cookie)
                finally:
                    os.close(namespace)
        except OSError:
            continue
    return set(found.values())


def cookie() -> int:
    """Of the network namespace that the thread is in (linux/net/core/sock.c, SO_NETNS_COOKIE)."""
    with socket.socket() as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


def control_groups(cluster: str) -> list[Path]:
    return [group for group in cgroups.groups_of(cluster) if group.exists()]
