"""HTTP requests, one after the other: ``python3 ask.py [-4|-6] [-n COUNT] [-k] [-X METHOD] [-H "NAME: VALUE"]... URL``.

Prints for each, as JSON, the status, milliseconds, and what the body says; status 0 where there was no answer, and why. Each has a
connection of its own unless ``-k`` keeps one for all.
"""

import argparse
import http.client
import json
import socket
import time
import urllib.parse

parser = argparse.ArgumentParser()
parser.add_argument("-4", dest="family", action="store_const", const=socket.AF_INET, default=socket.AF_UNSPEC)
parser.add_argument("-6", dest="family", action="store_const", const=socket.AF_INET6)
parser.add_argument("-n", dest="count", type=int, default=1)
parser.add_argument("-k", dest="keep", action="store_true")
parser.add_argument("-X", dest="method", default="GET")
parser.add_argument("-H", dest="headers", action="append", default=[])
parser.add_argument("url")
asked = parser.parse_args()
url = urllib.parse.urlsplit(asked.url)
headers = {"Host": url.netloc} | {name: value.strip() for name, _, value in (each.partition(":") for each in asked.headers)}
connection = None
for _ in range(asked.count):
    began = time.monotonic()
    try:
        if connection is None:
            address = socket.getaddrinfo(url.hostname, url.port or 80, asked.family, socket.SOCK_STREAM)[0][4][0]
            connection = http.client.HTTPConnection(address, url.port or 80, timeout=10)
        connection.request(asked.method, url.path or "/", headers=headers)
        response = connection.getresponse()
        status, text = response.status, response.read().decode()
    except (OSError, http.client.HTTPException) as exc:
        status, text = 0, f"{type(exc).__name__}: {exc}"
    if connection is not None and (not status or not asked.keep):
        connection.close()
        connection = None
    print(json.dumps({"status": status, "ms": round((time.monotonic() - began) * 1000), "text": text}))
