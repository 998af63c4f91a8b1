"""The database's client, and the web server that the shop's services are made of."""

import json
import socket
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DATABASE = ("database-0.database", 5000)
PATIENCE = 10.0


def ask(*lines: str) -> list[str]:
    """One connection to the database, an answer for each line. Raises OSError."""
    with socket.create_connection(DATABASE, PATIENCE) as sock, sock.makefile("rw") as file:
        greeting = file.readline()
        if not greeting.startswith("READY database-0"):
            raise ConnectionError(f"the database said {greeting!r}")
        answers = []
        for line in lines:
            file.write(f"{line}\n")
            file.flush()
            answers.append(file.readline().strip())
        return answers


def fetch(url: str) -> object:
    """The JSON at a URL. Raises OSError, ValueError."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        return json.load(response)


def serve(port: int, pages: dict[str, Callable[[], object]]) -> None:
    """A JSON page for each path; an error of ours is status 500 with its text."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = pages.get(self.path)
            try:
                status, body = (200, page()) if page else (404, "no such page")
            except (OSError, ValueError) as exc:
                status, body = 500, f"{type(exc).__name__}: {exc}"
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass  # what is worth telling is in the pages

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6  # and IPv4 with it
        request_queue_size = 256

    Server(("::", port), Handler).serve_forever()
