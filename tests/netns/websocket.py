"""Both ends of a WebSocket: ``websocket.py serve PORT``, and ``websocket.py talk HOST PORT PATH``, which prints what comes back.

The server sends each message back. The client waits for each before it sends the next, one of them too large for any buffer on the way.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Event, Message, Ping, RejectConnection, Request

LARGE = 3 << 20


def receive(sock: socket.socket, connection: WSConnection) -> list[Event]:
    """The next events; none when the peer has gone."""
    while True:
        data = sock.recv(65536)
        connection.receive_data(data or None)
        events = list(connection.events())
        if events or not data:
            return events


def serve(sock: socket.socket) -> None:
    connection = WSConnection(ConnectionType.SERVER)
    with sock:
        while events := receive(sock, connection):
            for event in events:
                match event:
                    case Request():
                        sock.sendall(connection.send(AcceptConnection(subprotocol=next(iter(event.subprotocols), None))))
                    case Message():
                        sock.sendall(connection.send(type(event)(data=event.data, message_finished=event.message_finished)))
                    case Ping() | CloseConnection():
                        sock.sendall(connection.send(event.response()))


def talk(host: str, port: int, path: str) -> None:
    connection = WSConnection(ConnectionType.CLIENT)
    with socket.create_connection((host, port), timeout=20) as sock:
        sock.sendall(connection.send(Request(host=f"[{host}]" if ":" in host else host, target=path, subprotocols=["echo"])))
        for event in receive(sock, connection):
            match event:
                case AcceptConnection():
                    print(json.dumps({"accepted": event.subprotocol}), flush=True)
                case RejectConnection():
                    print(json.dumps({"rejected": event.status_code}), flush=True)
                    return
        for message in (b"one", b"two", b"x" * LARGE):
            sock.sendall(connection.send(Message(data=message)))
            got = b""
            while len(got) < len(message):
                found = receive(sock, connection)
                assert found, "closed"
                got += b"".join(bytes(event.data) for event in found if isinstance(event, Message))
            print(json.dumps({"echoed": len(got), "same": got == message}), flush=True)
        sock.sendall(connection.send(CloseConnection(code=1000, reason="done")))
        closed = [event for event in receive(sock, connection) if isinstance(event, CloseConnection)]
        print(json.dumps({"closed": closed[0].code if closed else None}), flush=True)


if sys.argv[1] == "talk":
    talk(sys.argv[2], int(sys.argv[3]), sys.argv[4])
else:
    listener = socket.create_server(("::", int(sys.argv[2])), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
