"""Istio's own node proxy on a node of a lab, beside our agent: configured and certified by our control plane, told of its pods as Istio's
CNI agent does it (ZDS: protobuf messages over a SEQPACKET socket, with a pod's network namespace as descriptor; reference: ztunnel's
``proto/zds.proto``).
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mesh.testing.lab import Lab
from meshctl_py.lab.home import LabHome
from meshctl_py.lab.programs import control_plane
from ztunnel_py.redirect.apply import apply_capture
from ztunnel_py.redirect.plan import PodCapture, plan_capture

_ADD, _SNAPSHOT_SENT = 1, 3
"""Fields of ``WorkloadRequest``."""
_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A pod that Istio's proxy is to serve; its service account has its own name."""

    namespace: str
    name: str


class IstioZtunnel:
    """A running one. ``log`` grows while it runs."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def access(self, *words: str) -> list[str]:
        """Lines of its access log that hold all the words."""
        lines = (line for line in self._log.read_text().splitlines() if "\taccess\t" in line)
        return [line for line in lines if all(word in line for word in words)]

    @property
    def log(self) -> str:
        return self._log.read_text()


@contextmanager
def serving(lab: Lab, binary: Path, node: str, pods: Sequence[Served], directory: Path) -> Iterator[IstioZtunnel]:
    """Pods of ``node`` captured and served until the block ends."""
    log, uds = directory / "ztunnel.log", directory / "zds.sock"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        listener.bind(str(uds))
        listener.listen()
        listener.settimeout(_PATIENCE)
        # Not the node's own namespace, where our agent has the ports: what is about pods happens in theirs.
        place = stack.enter_context(lab.inside("router"))
        output = stack.enter_context(log.open("wb"))
        command = [str(binary.resolve()), "proxy"]
        process = place.run(
            lambda: subprocess.Popen(command, env=os.environ | _environment(lab, node, uds), stdout=output, stderr=subprocess.STDOUT)
        )
        stack.callback(_end, process)
        conversation, _ = listener.accept()
        stack.enter_context(conversation)
        conversation.settimeout(_PATIENCE)
        assert conversation.recv(1024) == b"\x08\x01", "ztunnel speaks another version of ZDS"
        for pod in pods:
            namespace = stack.enter_context(lab.inside(f"{pod.namespace}/{pod.name}"))
            _ask(conversation, _add_workload(pod), [namespace.fd])
            apply_capture(namespace.fd, plan_capture(PodCapture(ipv6=True, dns=True)))
        _ask(conversation, _field(_SNAPSHOT_SENT, b""), [])
        yield IstioZtunnel(log)


def _environment(lab: Lab, node: str, uds: Path) -> dict[str, str]:
    return {
        "NODE_NAME": node,
        "PROXY_MODE": "shared",
        "INPOD_UDS": str(uds),
        **control_plane(LabHome(lab.name, lab.home)),
        "AUTH_TOKEN": str(lab.home / "tokens" / f"{node}.token"),
        "POD_NAME": f"istio-ztunnel-{node}",
        "POD_NAMESPACE": "istio-system",
        "ZTUNNEL_WORKER_THREADS": "1",
        "RUST_LOG": "info",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    killer = threading.Timer(10, process.kill)
    killer.start()
    process.wait()
    killer.cancel()


# --- ZDS


def _add_workload(pod: Served) -> bytes:
    info = _field(1, pod.name.encode()) + _field(2, pod.namespace.encode()) + _field(3, pod.name.encode())
    return _field(_ADD, _field(1, f"uid-{pod.namespace}-{pod.name}".encode()) + _field(2, info))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of protobuf; all that ZDS has is shorter than 128 bytes."""
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def _ask(conversation: socket.socket, request: bytes, descriptors: Sequence[int]) -> None:
    socket.send_fds(conversation, [request], descriptors)
    answer = conversation.recv(1024)
    assert answer == _field(1, b""), f"refused: {answer!r}"
