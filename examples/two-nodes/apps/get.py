"""One HTTP request: ``python3 get.py URL [4|6]``. Prints the answer; or what went wrong, and exits with status 1."""

import http.client
import socket
import sys
import urllib.parse

url = urllib.parse.urlsplit(sys.argv[1])
family = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(sys.argv[2] if len(sys.argv) > 2 else "", socket.AF_UNSPEC)
try:
    address = socket.getaddrinfo(url.hostname, url.port or 80, family, socket.SOCK_STREAM)[0]
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=5)
    connection.sock = socket.create_connection(address[4][:2], timeout=5)
    connection.request("GET", f"{url.path or '/'}{'?' + url.query if url.query else ''}", headers={"Host": url.netloc})
    response = connection.getresponse()
    print(f"{response.status} {response.read().decode().strip()}")
except (OSError, http.client.HTTPException) as exc:
    print(f"{type(exc).__name__}: {exc}")
    sys.exit(1)
