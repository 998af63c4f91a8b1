"""A web server behind TLS of its own: ``tls_web.py PORT VERSION CHAIN KEY [ROOTS]``. With ROOTS, clients must prove themselves by them.

It says what it is, which name it was asked for by (SNI), and who the client is.
"""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import sys
import time
from pathlib import Path

PORT, VERSION, CHAIN, KEY, *ROOTS = sys.argv[1:]
while not Path(KEY).exists():
    time.sleep(0.1)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        assert isinstance(self.connection, ssl.SSLSocket)
        peer = self.connection.getpeercert() or {}
        subject = [value for part in peer.get("subject", ()) for _, value in part]
        told = {"version": VERSION, "sni": ASKED.get(id(self.connection)), "client": subject}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what passes is seen elsewhere."""


ASKED: dict[int, str | None] = {}


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who does not trust us goes away."""


def note(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
    ASKED[id(connection)] = name


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(CHAIN, KEY)
context.sni_callback = note
if ROOTS:
    context.load_verify_locations(ROOTS[0])
    context.verify_mode = ssl.CERT_REQUIRED
server = Server(("::", int(PORT)), Handler)
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
