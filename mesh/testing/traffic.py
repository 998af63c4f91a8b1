"""Traffic between two processes anywhere, for tests and benches: a server, and clients that print what they saw as JSON.

    python3 traffic.py serve PORT
    python3 traffic.py COMMAND HOST PORT [NUMBER...]

Standard library only, and run by its path, so that any pod of a lab can. The first byte of a connection tells the server what to do; the
client functions are the commands.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

BLOCK = 1 << 20
PATIENCE = 60.0
"""Seconds any call may wait for its bytes."""

ECHO, SINK, SOURCE, DIGEST, NOISE, FAREWELL, RECALL = b"e", b"u", b"d", b"h", b"n", b"f", b"r"


# --- the server


def serve(listener: socket.socket) -> None:
    """Serve for ever, a thread per connection."""
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_serve_one, args=(sock,), daemon=True).start()


def listen(port: int, host: str = "::") -> socket.socket:
    """A listener; dual-stack on ``::``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, dualstack_ipv6=host == "::", backlog=512)


def _serve_one(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with sock:
        try:
            _SERVICES.get(sock.recv(1), _echo)(sock)
        except OSError:
            pass  # the client broke off, which is its right


def _echo(sock: socket.socket) -> None:
    buffer = bytearray(BLOCK)
    while size := sock.recv_into(buffer):
        sock.sendall(memoryview(buffer)[:size])


def _sink(sock: socket.socket) -> None:
    """Swallow everything, then say that it was all."""
    buffer = bytearray(BLOCK)
    while sock.recv_into(buffer):
        pass
    sock.sendall(b".")


def _source(sock: socket.socket) -> None:
    """So many blocks of zeros, then wait for the client to end: whoever closes first bears TIME_WAIT."""
    block = bytes(BLOCK)
    for _ in range(int.from_bytes(_exactly(sock, 4), "big")):
        sock.sendall(block)
    sock.recv(1)


def _digest(sock: socket.socket) -> None:
    """The digest of everything up to the end of the client's direction: an answer that only a half-closed connection can carry."""
    sock.sendall(_digest_of_rest(sock).encode())


def _noise(sock: socket.socket) -> None:
    """So many blocks of noise and their digest, then end our direction, although the client has not ended its own."""
    digest = hashlib.sha256()
    for block in _noise_blocks(int.from_bytes(_exactly(sock, 4), "big"), seed=1):
        digest.update(block)
        sock.sendall(block)
    sock.sendall(digest.hexdigest().encode())
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)


_farewells: list[str] = []


def _farewell(sock: socket.socket) -> None:
    """End our direction first and go on reading to the end of the client's; the digest of it is told to whoever asks next."""
    sock.shutdown(socket.SHUT_WR)
    _farewells.append(_digest_of_rest(sock))


def _recall(sock: socket.socket) -> None:
    """The digest of the last farewell, once there is one."""
    deadline = time.monotonic() + PATIENCE
    while not _farewells and time.monotonic() < deadline:
        time.sleep(0.01)
    sock.sendall(_farewells.pop().encode() if _farewells else b"none")


_SERVICES: dict[bytes, Callable[[socket.socket], None]] = {
    ECHO: _echo,
    SINK: _sink,
    SOURCE: _source,
    DIGEST: _digest,
    NOISE: _noise,
    FAREWELL: _farewell,
    RECALL: _recall,
}


# --- the clients


def dial(host: str, port: int, service: bytes = b"") -> socket.socket:
    """A connection to the server, with its first byte sent."""
    sock = socket.create_connection((host, port), timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(service)
    return sock


def upload(host: str, port: int, blocks: int) -> dict[str, float]:
    """Send so many blocks of zeros."""
    block, began = bytes(BLOCK), time.perf_counter()
    with dial(host, port, SINK) as sock:
        for _ in range(blocks):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        if sock.recv(1) != b".":
            raise ConnectionError("the server did not get all")
    return {"seconds": time.perf_counter() - began}


def download(host: str, port: int, blocks: int) -> dict[str, float]:
    """Receive so many blocks of zeros."""
    buffer, left, began = bytearray(BLOCK), blocks * BLOCK, time.perf_counter()
    with dial(host, port, SOURCE + blocks.to_bytes(4, "big")) as sock:
        while left and (size := sock.recv_into(buffer)):
            left -= size
    if left:
        raise ConnectionError(f"{left} bytes are missing")
    return {"seconds": time.perf_counter() - began}


def short(host: str, port: int, count: int) -> dict[str, float]:
    """So many connections, one after the other: connect, a small echo, close."""
    began = time.perf_counter()
    for _ in range(count):
        with dial(host, port, ECHO + b"hello") as sock:
            if sock.recv(100) != b"hello":
                raise ConnectionError("no echo")
    return {"seconds": time.perf_counter() - began}


def trips(host: str, port: int, count: int) -> dict[str, float]:
    """So many round trips of 100 bytes on one connection; the median in seconds."""
    message, times = b"x" * 100, []
    with dial(host, port, ECHO) as sock:
        for _ in range(count):
            began = time.perf_counter()
            sock.sendall(message)
            _exactly(sock, 100)
            times.append(time.perf_counter() - began)
    return {"median": statistics.median(times)}


def echo(host: str, port: int, blocks: int) -> dict[str, object]:
    """Noise to and fro at the same time, our direction ended when all is sent: what went out and what came back, by digest."""
    with dial(host, port, ECHO) as sock:
        return _exchange(sock, blocks, seed=0)


def many(host: str, port: int, count: int, size: int) -> dict[str, int]:
    """So many connections at once, all open before the first ends; noise of ``size`` bytes on each. How many got theirs back."""
    with ExitStack() as stack:
        socks = [stack.enter_context(dial(host, port, ECHO)) for _ in range(count)]
        texts = [random.Random(number).randbytes(size) for number in range(count)]
        for sock in socks:  # every connection answers while all are open
            sock.sendall(b"?")
            _exactly(sock, 1)
        for sock, text in zip(socks, texts, strict=True):
            sock.sendall(text)
        return {"echoed": sum(_exactly(sock, size) == text for sock, text in zip(socks, texts, strict=True))}


def endfirst(host: str, port: int, blocks: int) -> dict[str, bool]:
    """End our direction while the server still has something to say: the digest of what it got."""
    digest = hashlib.sha256()
    with dial(host, port, DIGEST) as sock:
        for block in _noise_blocks(blocks, seed=2):
            digest.update(block)
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        return {"same": _rest(sock).decode() == digest.hexdigest()}


def endlast(host: str, port: int, blocks: int) -> dict[str, bool]:
    """The server ends its direction while we still have something to say; another connection asks for the digest of what it got."""
    digest = hashlib.sha256()
    with dial(host, port, FAREWELL) as sock:
        if sock.recv(1):
            raise ConnectionError("the server did not end its direction")
        for block in _noise_blocks(blocks, seed=3):
            digest.update(block)
            sock.sendall(block)
    with dial(host, port, RECALL) as sock:
        return {"same": _rest(sock).decode() == digest.hexdigest()}


def noise(host: str, port: int, blocks: int) -> dict[str, bool]:
    """So many blocks of noise from the server, compared with their digest."""
    with dial(host, port, NOISE + blocks.to_bytes(4, "big")) as sock:
        digest = _digest_of(sock, blocks * BLOCK)
        return {"same": _rest(sock).decode() == digest}


def hear(host: str, port: int) -> dict[str, str]:
    """What a server says that speaks first."""
    with dial(host, port) as sock:
        return {"heard": sock.recv(200).decode()}


def attempt(host: str, port: int) -> dict[str, str]:
    """Connect, say something and tell what comes of it: ``echo``, ``closed`` or the name of an error."""
    try:
        with dial(host, port, ECHO + b"hello") as sock:
            return {"outcome": "echo" if sock.recv(100) == b"hello" else "closed"}
    except OSError as exc:
        return {"outcome": type(exc).__name__}


def _exchange(sock: socket.socket, blocks: int, seed: int) -> dict[str, object]:
    sent = hashlib.sha256()

    def send() -> None:
        for block in _noise_blocks(blocks, seed):
            sent.update(block)
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = _digest_of_rest(sock)
    sender.join()
    return {"bytes": blocks * BLOCK, "sent": sent.hexdigest(), "received": received}


def _noise_blocks(count: int, seed: int) -> list[bytes]:
    """The same block over and over would pass though blocks were swapped; so each is another."""
    rng = random.Random(seed)
    return [rng.randbytes(BLOCK) for _ in range(count)]


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError(f"ended after {len(data)} of {size} bytes")
        data += part
    return bytes(data)


def _rest(sock: socket.socket) -> bytes:
    data = bytearray()
    while part := sock.recv(65536):
        data += part
    return bytes(data)


def _digest_of(sock: socket.socket, size: int) -> str:
    digest = hashlib.sha256()
    while size and (part := sock.recv(min(size, BLOCK))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()


def _digest_of_rest(sock: socket.socket) -> str:
    digest = hashlib.sha256()
    while part := sock.recv(BLOCK):
        digest.update(part)
    return digest.hexdigest()


CLIENTS: dict[str, Callable[..., object]] = {
    client.__name__: client for client in (upload, download, short, trips, echo, many, endfirst, endlast, noise, hear, attempt)
}


def main(arguments: list[str]) -> None:
    if arguments[0] == "serve":
        serve(listen(int(arguments[1])))
    host, port, *numbers = arguments[1:]
    print(json.dumps(CLIENTS[arguments[0]](host, int(port), *map(int, numbers))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
