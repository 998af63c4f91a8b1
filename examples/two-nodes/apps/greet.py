"""Waits for a server to speak first: ``python3 greet.py HOST PORT [4|6]``. Prints milliseconds and the greeting, then one answer."""

import socket
import sys
import time

host, port = sys.argv[1:3]
family = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(sys.argv[3] if len(sys.argv) > 3 else "", socket.AF_UNSPEC)
try:
    address = socket.getaddrinfo(host, int(port), family, socket.SOCK_STREAM)[0][4]
    began = time.monotonic()
    with socket.create_connection(address[:2], timeout=5) as connection, connection.makefile("rw") as lines:
        greeting = lines.readline().strip()
        waited = (time.monotonic() - began) * 1000
        print("select 1", file=lines, flush=True)
        print(f"{waited:.0f} {greeting} / {lines.readline().strip()}")
except OSError as exc:
    print(f"{type(exc).__name__}: {exc}")
    sys.exit(1)
