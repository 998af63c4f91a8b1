"""A connection to a port of a pod, through the API server and the kubelet: port-forward over a WebSocket.

The protocol is ``v4.channel.k8s.io``: every message begins with its channel, 0 for the port's bytes and 1 for what went wrong, and the
first two bytes of each channel repeat the port. API servers pass it on to the kubelet. The newer ``SPDY/3.1+portforward.k8s.io``, which
kubectl prefers since 1.31, wraps a whole SPDY connection with its compressed headers for the sake of several ports, and we need one. What
is missing in the older one is the half-close, so it suits protocols whose requests say where they end, as HTTP's do.
"""

from __future__ import annotations

from typing import Final

import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Message,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from mesh.kube.api import ApiClient, ApiUnavailable, api_error, network_failures
from mesh.kube.resources import RESOURCES

PROTOCOL: Final = "v4.channel.k8s.io"
OPEN_TIMEOUT: Final = 30.0
"""Seconds until the kubelet has taken the connection, as `api.REQUEST_TIMEOUT`."""
MAX_MESSAGE: Final = 4 << 20
"""Kubelets send at most 32 KiB at a time."""
_MAX_REFUSAL: Final = 64 << 10
_READ: Final = 64 << 10
_DATA, _ERROR = 0, 1
_PORT_BYTES: Final = 2


class PodPort(trio.abc.Stream):
    """The stream. Methods raise trio's errors; when the kubelet said why the port can't be reached, that is their text."""

    def __init__(self, stream: trio.abc.Stream, socket: WSConnection) -> None:
        self._stream = stream
        self._socket = socket
        self._received = bytearray()
        self._message = bytearray()
        self._ended = False
        self._skip = {_DATA: _PORT_BYTES, _ERROR: _PORT_BYTES}
        self._error = ""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        try:
            frame = self._socket.send(Message(data=bytes([_DATA]) + bytes(data)))
        except LocalProtocolError as exc:
            raise trio.BrokenResourceError(self._error or "the port-forward has ended") from exc
        await self._stream.send_all(frame)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes of the port, ``b""`` when the other side has closed."""
        await trio.lowlevel.checkpoint()
        while not self._received and not self._ended:
            await self._read()
        if not self._received and self._error:
            raise trio.BrokenResourceError(self._error)
        size = len(self._received) if max_bytes is None else max_bytes
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def open(self) -> None:
        """Read until the server has taken the connection. Raises ApiError, ApiUnavailable."""
        refused: RejectConnection | None = None
        text = b""
        while True:
            events = await self._events()
            for number, event in enumerate(events, 1):
                match event:
                    case AcceptConnection():
                        if event.subprotocol != PROTOCOL:
                            raise ApiUnavailable(f"the API server does not speak {PROTOCOL}")
                        for later in events[number:]:  # what came in the same read as the answer
                            await self._take(later)
                        return
                    case RejectConnection():
                        refused = event
                        if not event.has_body:
                            raise api_error(event.status_code, b"")
                    case RejectData() if refused is not None:
                        text += event.data
                        if event.body_finished or len(text) > _MAX_REFUSAL:
                            raise api_error(refused.status_code, text)
                    case _:
                        raise ApiUnavailable("the API server broke off before the port-forward began")

    async def _read(self) -> None:
        for event in await self._events():
            await self._take(event)

    async def _events(self) -> list[Event]:
        """What the next bytes bring; at the stream's end a CloseConnection."""
        data = await self._stream.receive_some(_READ)
        try:
            self._socket.receive_data(bytes(data) or None)
            return list(self._socket.events())
        except RemoteProtocolError as exc:
            raise trio.BrokenResourceError(f"not WebSocket: {exc}") from exc

    async def _take(self, event: Event) -> None:
        match event:
            case BytesMessage() | TextMessage():
                self._message += event.data if isinstance(event.data, bytes | bytearray) else event.data.encode()
                if len(self._message) > MAX_MESSAGE:
                    raise trio.BrokenResourceError(f"a message of more than {MAX_MESSAGE >> 20} MiB")
                if event.message_finished:
                    self._finish_message()
            case Ping():
                await self._stream.send_all(self._socket.send(event.response()))
            case CloseConnection():
                self._ended = True

    def _finish_message(self) -> None:
        channel, data = self._message[0] if self._message else -1, bytes(self._message[1:])
        self._message.clear()
        if channel not in self._skip:
            raise trio.BrokenResourceError(f"a message of channel {channel}, which was not asked for")
        skipped = min(self._skip[channel], len(data))
        self._skip[channel] -= skipped
        if channel == _DATA:
            self._received += data[skipped:]
        elif data[skipped:]:
            self._error = (self._error + data[skipped:].decode("utf-8", "replace"))[:1000]
            self._ended = True


async def open_port(client: ApiClient, namespace: str, pod: str, port: int) -> PodPort:
    """Connect to a port of a pod, on the pod's own loopback. Raises ApiError, ApiUnavailable."""
    path = RESOURCES["Pod"].path(namespace, pod, "portforward")
    with network_failures(), trio.fail_after(OPEN_TIMEOUT):
        stream, target, headers = await client.open_stream(path, {"ports": str(port)})
        try:
            fields = dict(headers)
            host = fields.pop("host")
            fields.pop("accept")
            socket = WSConnection(ConnectionType.CLIENT)
            extra = [(name.encode(), value.encode()) for name, value in fields.items()]
            request = Request(host=host, target=target, subprotocols=[PROTOCOL], extra_headers=extra)
            await stream.send_all(socket.send(request))
            forwarded = PodPort(stream, socket)
            await forwarded.open()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return forwarded
