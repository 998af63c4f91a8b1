"""What one connection may cost its neighbours in the same loop: counted in turns and bytes of others, not in time."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.reactor.loop import BYTE_BUDGET
from mesh.testing.ca import FakeCa
from mesh.testing.proxies import Path, ReactorThread, wait_until
from mesh.tls.contexts import hbone_context

Contexts = tuple[SSL.Context, SSL.Context]
MESSAGES = 100
MOST_A_TURN = 12 * BYTE_BUDGET
"""Of two tunnels: three sends and three reads each, since an event and two rounds of calls may find work. A spliced connection: four moves,
each of less than two budgets."""


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    bundle = FakeCa().issue(SpiffeId("cluster.local", "default", "client"))
    return hbone_context(bundle), hbone_context(bundle)


@pytest.fixture
def thread() -> Iterator[ReactorThread]:
    with ReactorThread() as thread:
        yield thread
    assert thread.errors == []


class Crowd:
    """A bulk transfer and a reader that never reads, on a loop; ``moved`` is what the loop has moved for both."""

    def __init__(self, stack: ExitStack, thread: ReactorThread, contexts: Contexts | None) -> None:
        # Where tunnels come from is another loop: of its own, this one could not be sent more than it has sent itself.
        near = stack.enter_context(ReactorThread()) if contexts is not None else thread
        self._paths = [stack.enter_context(Path(near, contexts, thread)) for _ in range(2)]
        bulk, stuck = self._paths
        self._stop = threading.Event()
        sender, sink = (stack.enter_context(sock) for sock in bulk.connect())
        stuck_sender, _stuck = (stack.enter_context(sock) for sock in stuck.connect())
        for sock in (sender, stuck_sender):
            sock.settimeout(0.2)
        for work, sock in ((self._send, sender), (self._send, stuck_sender), (self._read, sink)):
            worker = threading.Thread(target=work, args=(sock,), daemon=True)
            worker.start()
            stack.callback(worker.join, 20)
        stack.callback(self._stop.set)

    def _send(self, sock: socket.socket) -> None:
        data = b"x" * (1 << 20)
        while not self._stop.is_set():
            with suppress(TimeoutError):
                sock.send(data)

    def _read(self, sock: socket.socket) -> None:
        buffer = bytearray(1 << 20)
        while not self._stop.is_set() and sock.recv_into(buffer):
            pass

    @property
    def moved(self) -> int:
        relays = [relay for path in self._paths for relay in (path.ingress or path.near).relays]
        return sum(relay.sent + relay.received for relay in relays)


@pytest.mark.parametrize("crowd_in_tunnel", [True, False], ids=["beside-tunnels", "beside-spliced"])
@pytest.mark.parametrize("in_tunnel", [True, False], ids=["tunnel", "spliced"])
def test_a_message_waits_for_a_turn_of_the_others_and_a_turn_is_bounded(
    thread: ReactorThread, contexts: Contexts, in_tunnel: bool, crowd_in_tunnel: bool
) -> None:
    """A message is passed on in the turn after it came, by each of the proxies on its way, whatever the others have to move."""
    proxies = 2 if in_tunnel else 1
    reactor = thread.reactor
    served: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    with ExitStack() as stack:
        path = stack.enter_context(Path(thread, contexts if in_tunnel else None))
        client, server = (stack.enter_context(sock) for sock in path.connect())
        crowd = Crowd(stack, thread, contexts if crowd_in_tunnel else None)
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        relay = (path.ingress or path.near).relays[0]

        def send() -> None:
            turn, moved, passed = reactor.turns, crowd.moved, relay.sent + relay.received

            def look() -> None:
                if relay.sent + relay.received > passed:
                    served.put((reactor.turns - turn, crowd.moved - moved))
                else:
                    reactor.call_soon(look)

            client.send(b"x")
            look()

        waits = []
        for _ in range(MESSAGES):
            wanted = crowd.moved + BYTE_BUDGET
            wait_until(lambda wanted=wanted: crowd.moved >= wanted, "the bulk transfer to go on")
            thread.call(send)
            waits.append(served.get(timeout=10))
            assert server.recv(1) == b"x"
    assert [moved for turns, moved in waits if moved > turns * MOST_A_TURN] == []
    # On a crowded machine the kernel may carry a segment over loopback late.
    assert sum(turns <= proxies for turns, _ in waits) >= 0.9 * MESSAGES, sorted(waits)
