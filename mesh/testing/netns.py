"""Network namespaces for tests: made, wired with veth pairs, served by echo servers, and gone at the end whatever happened.

Needs root and `ip` of iproute2. Sockets are opened inside a namespace but used from any thread of the test.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_interface
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from mesh.linux.netns import create_named_netns, delete_named_netns, open_netns, run_in_netns
from mesh.linux.sockets import peer_address
from mesh.model.address import IpAddress, SocketAddress

PATIENCE_SECONDS: Final = 15.0
"""How long anything in a test may take before it counts as broken; nothing is asserted about time."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Netns:
    """A namespace of the test. ``path`` names it for others, ``fd`` holds it."""

    name: str
    path: Path
    fd: int

    def run(self, function: Callable[[], _T]) -> _T:
        """Call a function inside."""
        return run_in_netns(self.fd, function)

    def output(self, *command: str, check: bool = True) -> str:
        """Run a program inside and return what it prints. Raises AssertionError with its complaint if it fails."""
        done = self.run(lambda: subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False))
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} in {self.name}: {done.stderr}")
        return done.stdout

    def connect(self, address: SocketAddress) -> socket.socket:
        """A blocking connection from inside, with a deadline on every call."""
        return self.run(lambda: socket.create_connection((str(address.ip), address.port), timeout=PATIENCE_SECONDS))

    def listen(self, port: int, ip: str = "::") -> socket.socket:
        """A blocking listener inside; dual-stack on ``::``."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        return self.run(lambda: socket.create_server((ip, port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=512))


@contextmanager
def namespaces(*names: str) -> Iterator[tuple[Netns, ...]]:
    """New namespaces with their loopback up; removed on leaving."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ambient-mesh-test-")))
        made: list[Netns] = []
        for name in names:
            path = create_named_netns(directory, name)
            stack.callback(delete_named_netns, path)
            fd = open_netns(path)
            stack.callback(os.close, fd)
            netns = Netns(name, path, fd)
            netns.output("ip", "link", "set", "lo", "up")
            made.append(netns)
        yield tuple(made)


def wire(a: Netns, b: Netns, a_addresses: tuple[str, ...], b_addresses: tuple[str, ...]) -> None:
    """A veth pair, ``eth0`` in ``a`` and an interface named after ``a`` in ``b``, with these addresses (``10.0.0.2/24``) at its ends,
    and the other end as default gateway of ``a``."""
    peer = f"to-{a.name}"[:15]
    a.output("ip", "link", "add", "eth0", "type", "veth", "peer", "name", peer, "netns", f"/proc/{os.getpid()}/fd/{b.fd}")
    for netns, device, addresses in ((a, "eth0", a_addresses), (b, peer, b_addresses)):
        for address in addresses:
            nodad = ("nodad",) if ":" in address else ()
            netns.output("ip", "address", "add", address, "dev", device, *nodad)
        netns.output("ip", "link", "set", device, "up")
    for address in b_addresses:
        gateway = ip_interface(address).ip
        a.output("ip", f"-{gateway.version}", "route", "add", "default", "via", str(gateway))


@dataclass(slots=True)
class EchoServer:
    """Answers every byte with itself; remembers who came. One thread for all connections."""

    listener: socket.socket
    clients: list[SocketAddress] = field(default_factory=list)
    _stop: tuple[socket.socket, socket.socket] = field(default_factory=socket.socketpair)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop[0].close()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)
        self._stop[1].close()
        self.listener.close()

    def saw(self, ip: IpAddress) -> int:
        """How many connections came from this address."""
        return sum(client.ip == ip for client in list(self.clients))

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.listener, selectors.EVENT_READ)
            selector.register(self._stop[1], selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    sock = key.fileobj
                    assert isinstance(sock, socket.socket)
                    if sock is self._stop[1]:
                        self._close_all(selector)
                        return
                    if sock is self.listener:
                        self._accept(selector)
                    else:
                        self._echo(selector, sock)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with suppress(OSError):
            sock, _ = self.listener.accept()
            sock.settimeout(PATIENCE_SECONDS)
            self.clients.append(peer_address(sock))
            selector.register(sock, selectors.EVENT_READ)

    def _echo(self, selector: selectors.BaseSelector, sock: socket.socket) -> None:
        try:
            data = sock.recv(65536)
            if data:
                sock.sendall(data)
                return
        except OSError:
            pass
        selector.unregister(sock)
        sock.close()

    def _close_all(self, selector: selectors.BaseSelector) -> None:
        for key in list(selector.get_map().values()):
            if key.fileobj not in (self.listener, self._stop[1]) and isinstance(key.fileobj, socket.socket):
                key.fileobj.close()


def echoes(sock: socket.socket, text: bytes = b"are you there?") -> bool:
    """Whether the other side still answers."""
    try:
        sock.sendall(text)
        received = b""
        while len(received) < len(text):
            part = sock.recv(len(text) - len(received))
            if not part:
                return False
            received += part
    except OSError:
        return False
    return received == text
