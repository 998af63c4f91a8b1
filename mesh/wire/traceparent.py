"""The `traceparent` header (W3C Trace Context): one id for a connection along all the proxies that carry it."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Traceparent:
    """``trace_id`` has 128 bits, ``parent_id`` 64, neither is 0; ``flags`` 8."""

    trace_id: int
    parent_id: int
    flags: int

    def __str__(self) -> str:
        """55 characters; always version 00."""
        return f"00-{self.trace_id:032x}-{self.parent_id:016x}-{self.flags:02x}"


def new_traceparent(rng: random.Random) -> str:
    """A new trace, not sampled, as every outbound connection begins one."""
    return f"00-{rng.getrandbits(128) or 1:032x}-{rng.getrandbits(64) or 1:016x}-00"


def parse_traceparent(value: str) -> Traceparent | None:
    """Read a value of exactly 55 characters. None, and never an exception, for anything else: the trace then starts anew.

    All-zero ids and version ff are invalid (W3C Trace Context 2.2.2).
    """
    match = _FORM.fullmatch(value)
    if match is None or match[1] == "ff":
        return None
    trace_id, parent_id = int(match[2], 16), int(match[3], 16)
    return Traceparent(trace_id, parent_id, int(match[4], 16)) if trace_id and parent_id else None
