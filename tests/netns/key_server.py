"""An identity provider that may mean ill: ``key_server.py PORT FILE``.

``/keys``: the file as it is now. ``/huge``: a body without end. ``/slow``: a byte a second. ``/moved?URL``: a redirect.
``/.well-known/openid-configuration``: where the keys are. Every request is printed.
"""

from __future__ import annotations

import http.server
import json
import socket
import sys
import time
from pathlib import Path

KEYS = Path(sys.argv[2])


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        print(f"{self.path}\n", end="", flush=True)  # in one writing: other threads write too
        path, _, query = self.path.partition("?")
        if path == "/moved":
            self.send_response(302)
            self.send_header("location", query)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        match path:
            case "/keys":
                self.wfile.write(KEYS.read_bytes())
            case "/.well-known/openid-configuration":
                here = f"http://{self.headers['host']}"
                self.wfile.write(json.dumps({"issuer": here, "jwks_uri": f"{here}/keys"}).encode())
            case "/huge":
                while True:
                    self.wfile.write(b" " * 65536)
            case "/slow":
                while True:
                    self.wfile.write(b" ")
                    time.sleep(1)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the path is printed already."""


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who asked has gone away: that is what is tested."""


Server(("::", int(sys.argv[1])), Handler).serve_forever()
