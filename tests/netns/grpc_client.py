"""A gRPC client: ``grpc_client.py TARGET CALL...``, each call a JSON object with ``method`` and, if wanted, ``body``, ``times``,
``deadline`` (seconds) and ``metadata``. Prints one JSON object a call: status, details, messages and trailers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import grpc

TOLD = ("x-served-by",)


def call(channel: grpc.Channel, method: str, body: bytes, deadline: float, metadata: list[tuple[str, str]]) -> dict[str, Any]:
    messages: list[str] = []
    try:
        if method.endswith("/Chat"):
            return {"code": "OK", "messages": chat(channel, method, int(body), deadline, metadata)}
        if method.endswith("/Break"):
            stream = channel.unary_stream(method)(body, timeout=deadline, metadata=metadata)
            messages.extend(message.decode() for message in stream)
            return {"code": "OK", "messages": messages}
        message, found = channel.unary_unary(method).with_call(body, timeout=deadline, metadata=metadata)
        trailers = {name: value for name, value in found.trailing_metadata() if name in TOLD}
        return {"code": "OK", "messages": [message.decode()], "trailers": trailers}
    except grpc.RpcError as exc:
        return {"code": exc.code().name, "details": exc.details(), "messages": messages}


def chat(channel: grpc.Channel, method: str, times: int, deadline: float, metadata: list[tuple[str, str]]) -> list[str]:
    """Each message is sent when the one before has come back, so that nobody on the way may wait for more."""
    queue: SimpleQueue[bytes | None] = SimpleQueue()

    def messages() -> Iterator[bytes]:
        while (message := queue.get()) is not None:
            yield message

    answers = channel.stream_stream(method)(messages(), timeout=deadline, metadata=metadata)
    found = []
    for number in range(times):
        queue.put(b"%d" % number + b"." * 40_000)
        found.append(next(answers).rstrip(b".").decode())
    queue.put(None)
    assert list(answers) == []
    return found


with grpc.insecure_channel(sys.argv[1]) as channel:
    for text in sys.argv[2:]:
        asked = json.loads(text)
        for _ in range(asked.get("times", 1)):
            body, metadata = str(asked.get("body", "")).encode(), list(asked.get("metadata", {}).items())
            print(json.dumps(call(channel, asked["method"], body, asked.get("deadline", 15), metadata)), flush=True)
