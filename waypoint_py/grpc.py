"""gRPC as a proxy sees it pass: how many messages a body holds. Pure."""

from __future__ import annotations


class MessageCounter:
    """Counts messages by their 5-byte prefixes, in whatever pieces the body comes. Of a body that is no gRPC the number means nothing."""

    __slots__ = ("_left", "_prefix", "count")

    def __init__(self) -> None:
        self._prefix = b""
        self._left = 0
        self.count = 0
        """Messages that are complete."""

    def feed(self, data: bytes | memoryview) -> None:
        at, size = 0, len(data)
        if size >= 5 and not (self._left or self._prefix) and int.from_bytes(data[1:5], "big") == size - 5:
            self.count += 1  # the usual piece: one message, whole
            return
        while at < size:
            if self._left:
                step = min(self._left, size - at)
                self._left -= step
                at += step
                self.count += not self._left
                continue
            take = min(5 - len(self._prefix), size - at)
            self._prefix += bytes(data[at : at + take])
            at += take
            if len(self._prefix) == 5:
                self._left = int.from_bytes(self._prefix[1:], "big")
                self._prefix = b""
                self.count += not self._left
