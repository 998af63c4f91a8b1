"""What `meshctl` and a lab say to each other: over the control socket one request and one reply, each a line of JSON; and, while a lab
starts, a line of JSON per event to whoever started it."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from meshctl_py.lab.enter import Entry
from meshctl_py.lab.status import LabStatus


class AskStatus(msgspec.Struct, frozen=True, tag="status"):
    """Answered by `LabStatus`."""


class AskEntry(msgspec.Struct, frozen=True, tag="enter"):
    """Where to run a command: ``router``, ``istiod``, a node's or a pod's name (``node/NAME`` and ``pod/NAME`` where both exist).

    Answered by `EntryReply` and the namespaces' descriptors.
    """

    target: str
    argv: tuple[str, ...]
    namespace: str | None = None
    container: str | None = None


class AskSignal(msgspec.Struct, frozen=True, tag="signal"):
    """Send a signal to a process of the lab, ``part``: to its descendants that have this word on their command line. Answered by `Done`."""

    process: str
    number: int
    part: str | None = None


class AskRestart(msgspec.Struct, frozen=True, tag="restart"):
    """Answered by `Done`."""

    process: str


class AskDown(msgspec.Struct, frozen=True, tag="down"):
    """Answered by `Done`; then the lab ends, which its lock shows."""


Request: TypeAlias = AskStatus | AskEntry | AskSignal | AskRestart | AskDown


class StatusReply(msgspec.Struct, frozen=True, tag="status"):
    status: LabStatus


class EntryReply(msgspec.Struct, frozen=True, tag="entry"):
    """``entry.join`` are indices into the descriptors that came along."""

    entry: Entry
    environment: dict[str, str]


class Done(msgspec.Struct, frozen=True, tag="done"):
    text: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    because: str


Reply: TypeAlias = StatusReply | EntryReply | Done | Refused


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """What the lab does, or is waiting for: names and reasons."""

    step: str
    pending: tuple[tuple[str, str], ...] = ()


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    status: LabStatus


class PendingWithLog(msgspec.Struct, frozen=True):
    what: str
    because: str
    log: str
    tail: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    because: str
    pending: tuple[PendingWithLog, ...] = ()
    status: LabStatus | None = None


Event: TypeAlias = Waiting | Ready | Failed

MAX_REQUEST = 1 << 20
MAX_DESCRIPTORS = 8
