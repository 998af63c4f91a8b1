"""An application that means ill: ``hostile_app.py PORT``. What it does to a request is in the path; it ends when its peer does."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Callable

OK = b"HTTP/1.1 200 OK\r\n"


def reset(sock: socket.socket) -> None:
    """What was sent before may get lost with it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def reset_within(sock: socket.socket) -> None:
    sock.sendall(OK + b"content-length: 1000\r\n\r\nthe beginning")
    threading.Event().wait(0.2)  # let it arrive: a reset takes what is not read yet with it
    reset(sock)


def say(data: bytes) -> Callable[[socket.socket], None]:
    return lambda sock: sock.sendall(data)


def for_ever(begin: bytes, again: bytes) -> Callable[[socket.socket], None]:
    def talk(sock: socket.socket) -> None:
        sock.sendall(begin)
        while True:
            sock.sendall(again)

    return talk


def be_deaf(sock: socket.socket) -> None:
    threading.Event().wait()


WAYS: dict[str, Callable[[socket.socket], None]] = {
    "/reset": reset,
    "/reset-within": reset_within,
    "/closes": say(b""),
    "/short": say(OK + b"content-length: 1000\r\n\r\nthe beginning"),
    "/garbage": say(b"\x00\xff\x16\x03\x01" * 1000),
    "/echoes-tls": say(b"\x15\x03\x03\x00\x02\x02\x28"),
    "/two-lengths": say(OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nok!"),
    "/huge-chunk": say(OK + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\nx"),
    "/nul": say(OK + b"x: a\0b\r\ncontent-length: 2\r\n\r\nok"),
    "/poison": say(OK + b"content-length: 2\r\n\r\nok" + OK + b"content-length: 6\r\n\r\npoison"),
    "/hints": for_ever(b"", b"HTTP/1.1 103 Early Hints\r\nlink: </a>; rel=preload\r\n\r\n" * 1000),
    "/continues": for_ever(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "/endless-line": for_ever(b"HTTP/1.1 200 ", b"O" * 65536),
    "/endless-head": for_ever(OK, b"x: y\r\n" * 10_000),
    "/endless-extension": for_ever(OK + b"transfer-encoding: chunked\r\n\r\n1;", b"x" * 65536),
    "/endless-trailers": for_ever(OK + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 10_000),
    "/endless-body": for_ever(OK + b"transfer-encoding: chunked\r\n\r\n", (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 4),
    "/deaf": be_deaf,
}


def serve(sock: socket.socket) -> None:
    with contextlib.suppress(OSError), sock:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := sock.recv(4096)):
                return
            head += data
        WAYS[head.split(b" ", 2)[1].decode()](sock)


listener = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
