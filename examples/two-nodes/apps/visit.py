"""Asks again and again, and forgets no failure: ``python3 visit.py URL``.

Two visitors over IPv4 and two over IPv6: one opens a connection for each request, one keeps a connection for as long as the server does.
Prints ``visiting`` when all have been answered. For each line of input it prints, as JSON: requests answered with 200 on fresh and on kept
connections, and what failed, with its time.
"""

import http.client
import json
import socket
import sys
import threading
import time
import urllib.parse

PAUSE = 0.01
url = urllib.parse.urlsplit(sys.argv[1])
began = time.monotonic()


class Visitor(threading.Thread):
    def __init__(self, family: int, keeps: bool) -> None:
        super().__init__(daemon=True)
        self.keeps = keeps
        self.answered = 0
        self.failed: list[str] = []
        address = socket.getaddrinfo(url.hostname, url.port or 80, family, socket.SOCK_STREAM)[0][4][0]
        self.connection = http.client.HTTPConnection(address, url.port or 80, timeout=10)

    def run(self) -> None:
        while True:
            if failure := self.ask():
                self.failed.append(f"{failure} after {time.monotonic() - began:.2f} s")
            else:
                self.answered += 1
            time.sleep(PAUSE)

    def ask(self) -> str:
        """Empty if all is well. http.client opens a connection where there is none, or where the server has said that it will close it."""
        try:
            self.connection.request("GET", url.path or "/", headers={"Host": url.netloc})
            response = self.connection.getresponse()
            response.read()
            if not self.keeps:
                self.connection.close()
            return "" if response.status == 200 else f"status {response.status}"
        except (OSError, http.client.HTTPException) as exc:
            self.connection.close()
            return f"{type(exc).__name__}: {exc}"


visitors = [Visitor(family, keeps) for family in (socket.AF_INET, socket.AF_INET6) for keeps in (False, True)]
for visitor in visitors:
    visitor.start()
while not all(visitor.answered or visitor.failed for visitor in visitors):
    time.sleep(PAUSE)
print("visiting", flush=True)
for _ in sys.stdin:
    fresh, kept = (sum(visitor.answered for visitor in visitors if visitor.keeps is keeps) for keeps in (False, True))
    print(json.dumps({"fresh": fresh, "kept": kept, "failed": [each for visitor in visitors for each in visitor.failed]}), flush=True)
