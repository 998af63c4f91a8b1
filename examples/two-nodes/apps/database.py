"""A server that speaks first, like MySQL: greets, then answers line by line. ``python3 database.py PORT``."""

import socket
import socketserver
import sys


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        try:
            self.wfile.write(b"8.4.0-example ready, log in please\n")
            for line in self.rfile:
                self.wfile.write(b"ok: " + line)
        except ConnectionError:
            pass


class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


Server(("::", int(sys.argv[1])), Handler).serve_forever()
