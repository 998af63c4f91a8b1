"""Holds connections to an echo server and talks on each ten times a second: ``python3 hold.py HOST PORT COUNT``.

Half of the connections are IPv4, half IPv6. Prints ``holding COUNT`` when all are open. For each line of input it prints, as JSON: how
many it holds, which broke (and why), messages echoed in order on each, and the longest wait for an echo in milliseconds.
"""

import contextlib
import json
import selectors
import socket
import sys
import time

PERIOD = 0.1
TRIES = 5
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def connect(address: tuple[str, int]) -> socket.socket:
    """A few tries. While connections live that an agent carried before the namespace left the mesh, the ports that it took for them at the
    server are not free there for our own: one try in some thousands gets no answer, and the next has another port."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(TimeoutError):
            return socket.create_connection(address, timeout=2)
    return socket.create_connection(address, timeout=2)


class Held:
    def __init__(self, family: int) -> None:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
        self.socket = connect(address[:2])
        self.socket.settimeout(10)
        self.sent = self.echoed = 0
        self.sent_at = self.longest = 0.0
        self.buffer = b""
        self.broken = ""

    def speak(self, now: float) -> None:
        if self.broken or self.sent > self.echoed:
            return  # the last one is still on its way; how long shows in `longest`
        self.sent += 1
        self.sent_at = now
        try:
            self.socket.sendall(f"{self.sent}\n".encode())
        except OSError as exc:
            self.broken = f"{type(exc).__name__} after {self.echoed} messages"

    def listen(self, now: float) -> None:
        try:
            data = self.socket.recv(65536)
        except OSError as exc:
            self.broken = f"{type(exc).__name__} after {self.echoed} messages"
            return
        if not data:
            self.broken = f"closed by the other side after {self.echoed} messages"
            return
        self.buffer += data
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            if int(line) != self.echoed + 1:
                self.broken = f"message {int(line)} came instead of {self.echoed + 1}"
            self.echoed += 1
            self.longest = max(self.longest, now - self.sent_at)


def report(connections: list[Held]) -> dict[str, object]:
    now = time.monotonic()
    living = [connection for connection in connections if not connection.broken]
    waiting = [now - connection.sent_at for connection in living if connection.sent > connection.echoed]
    return {
        "held": len(connections),
        "broken": [connection.broken for connection in connections if connection.broken],
        "echoed": [connection.echoed for connection in connections],
        "longest_ms": round(1000 * max([connection.longest for connection in connections] + waiting)),
    }


connections = [Held(socket.AF_INET6 if index % 2 else socket.AF_INET) for index in range(count)]
selector = selectors.DefaultSelector()
for connection in connections:
    selector.register(connection.socket, selectors.EVENT_READ, connection)
selector.register(sys.stdin, selectors.EVENT_READ)
print(f"holding {count}", flush=True)
next_round = time.monotonic()
while True:
    for key, _ in selector.select(max(0.0, next_round - time.monotonic())):
        if key.fileobj is sys.stdin:
            if not sys.stdin.readline():
                sys.exit()
            print(json.dumps(report(connections)), flush=True)
        else:
            key.data.listen(time.monotonic())
            if key.data.broken:
                selector.unregister(key.fileobj)
    if time.monotonic() >= next_round:
        next_round = time.monotonic() + PERIOD
        for connection in connections:
            connection.speak(time.monotonic())
