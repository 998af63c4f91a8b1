"""A page for browsers, and what it asks for: ``page_server.py PORT``. Every request is printed as one line of JSON.

The page's script does what pages of applications do, and writes what came of it below the heading. The last picture comes once the script
is done (``/done``), so that a browser which waits for the whole page waits for the script.
"""

from __future__ import annotations

import http.server
import json
import socket
import sys
import threading

PAGE = """\
<!doctype html>
<meta charset="utf-8">
<title>Shop</title>
<link rel="stylesheet" href="/style.css">
<h1>Shop</h1>
<p><img src="/1.svg"> <img src="/2.svg"> <img src="/3.svg"> <img src="/4.svg"> <img src="/last.svg"></p>
<table id="told"></table>
<script type="module" src="/page.js"></script>
"""
STYLE = """\
body { background: rgb(240, 250, 240); font: 16px sans-serif; margin: 2em; }
td { border-bottom: 1px solid #9c9; padding: 4px 12px; }
td:first-child { font-weight: bold; }
"""
SCRIPT = """\
import { tell } from "/tell.js";

const ORDER = { item: "tea", number: 2 };
const json = { "content-type": "application/json", "x-cart": "7" };
const asked = async (url, options) => fetch(url, options).then(
  async response => ({ status: response.status, served: response.headers.get("x-served"), text: await response.text() }),
  failure => ({ failure: failure.name }));

tell("style", getComputedStyle(document.body).backgroundColor);
tell("items", await asked("/items?from=2", { headers: json }));
tell("order", await asked("/items", { method: "POST", headers: json, body: JSON.stringify(ORDER) }));

const other = await asked("http://web/echo", { method: "PUT", headers: json, body: JSON.stringify(ORDER) });
tell("another origin", other.text ? { ...other, text: JSON.parse(other.text).body } : other);
tell("another origin, method not allowed", await asked("http://web/", { method: "DELETE" }));
tell("another origin that allows nobody", await asked("http://web-v1/"));

const events = new EventSource("/events");
tell("events", await new Promise(done => {
  const heard = [];
  events.onmessage = event => { heard.push(event.data); if (heard.length === 4) { events.close(); done(heard); } };
}));

tell("socket", await new Promise(done => {
  const said = "x".repeat(1 << 20), heard = [];
  const socket = new WebSocket("ws://" + location.host + "/chat", "echo");
  let length = 0;
  socket.onopen = () => { heard.push(socket.protocol); socket.send("hello"); };
  socket.onmessage = event => {
    length += event.data.length;
    if (event.data === "hello") { heard.push("hello"); socket.send(said); }
    if (length === said.length + 5) { heard.push(length); socket.close(1000); }
  };
  socket.onclose = event => done([...heard, event.code]);
}));

await Promise.all([...document.images].slice(0, 4).map(image => image.decode()));
tell("pictures", [...document.images].slice(0, 4).map(image => image.naturalWidth));
await fetch("/done");
"""
TELL = """\
export function tell(what, came) {
  const row = document.getElementById("told").insertRow();
  row.insertCell().textContent = what;
  row.insertCell().textContent = JSON.stringify(came);
}
"""
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" width="{0}0" height="40"><circle cx="20" cy="20" r="{0}8" fill="#393"/></svg>'
FILES = {
    "/": ("text/html", PAGE),
    "/style.css": ("text/css", STYLE),
    "/page.js": ("text/javascript", SCRIPT),
    "/tell.js": ("text/javascript", TELL),
    **{f"/{number}.svg": ("image/svg+xml", PICTURE.format(number)) for number in (1, 2, 3, 4)},
    "/last.svg": ("image/svg+xml", PICTURE.format(5)),
    "/done": ("text/plain", ""),
}
DONE = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        line = json.dumps({"method": self.command, "path": self.path, "headers": headers})
        print(f"{line}\n", end="", flush=True)  # in one writing: other threads write too
        if self.path == "/events":
            self.send_events()
            return
        if self.path == "/done":
            DONE.set()
        elif self.path == "/last.svg":
            DONE.wait()
            DONE.clear()
        if self.path.startswith("/items"):
            self.send_whole(200, "application/json", json.dumps({"cart": headers.get("x-cart"), "path": self.path}))
        elif self.path in FILES:
            self.send_whole(200, *FILES[self.path])
        else:
            self.send_whole(404, "text/plain", "no such thing")

    do_POST = do_PUT = do_OPTIONS = do_GET

    def send_whole(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_events(self) -> None:
        """Two at a time; the browser comes again for those behind the last that it heard."""
        last = int(self.headers.get("last-event-id", "0"))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("cache-control", "no-store")
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(b"retry: 20\n\n")
        for number in (last + 1, last + 2):
            self.wfile.write(f"id: {number}\ndata: event {number}\n\n".encode())
            self.wfile.flush()
            threading.Event().wait(0.05)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the request is printed already."""


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True


Server(("::", int(sys.argv[1])), Handler).serve_forever()
