"""A web server that says what it is and what it was asked: ``versioned_web.py PORT VERSION``.

``/flaky``: every other request fails with 503. ``/close``: the connection ends with the answer. ``/slow``: the answer takes a second.
``/echo``: the request's body is in the answer. ``/late``: the body is read after a second. ``/only/VERSION``: fails in that version alone.
Each request is printed as one line of JSON.
"""

from __future__ import annotations

import http.server
import itertools
import json
import socket
import sys
import time

VERSION = sys.argv[2]
ASKED = itertools.count(1)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one segment: else the second waits for the peer's delayed acknowledgement of the first

    def do_GET(self) -> None:
        if self.path == "/late":
            time.sleep(1)
        received = self.read_body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        fails = (self.path == "/flaky" and next(ASKED) % 2 == 1) or self.path == f"/only/{VERSION}"
        if self.path == "/slow":
            time.sleep(1)
        told = {"version": VERSION, "method": self.command, "path": self.path, "headers": headers, "received": len(received)}
        if self.path == "/echo":
            told["body"] = received.decode("latin-1")
        print(f"{json.dumps(told)}\n", end="", flush=True)  # in one writing: other threads write too
        body = json.dumps(told).encode()
        self.send_response(503 if fails else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if self.path.startswith("/close"):
            self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what passes is seen elsewhere."""


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True
    request_queue_size = 1024
    """Of five, the default, bursts of connections find it full, and wait for TCP's next attempt: seconds."""

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super(http.server.HTTPServer, self).server_bind()  # HTTPServer's own would ask DNS for our name


Server(("::", int(sys.argv[1])), Handler).serve_forever()
