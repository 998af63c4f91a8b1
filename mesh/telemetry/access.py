"""The access log: one record a connection, in the node proxy's line format or as JSON. Formatting is pure; `AccessLog` writes.

Fields and their order are ztunnel's (target ``access``). Ours follow them: ``response_flags``, ``policy``, ``rule``, ``because`` and
``closed_first``, so that one line answers who was refused by what, and who ended the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.workload import Workload
from mesh.telemetry.log import quoted, timestamp
from mesh.telemetry.output import LogOutput

SCOPE: Final = "access"

Direction = Literal["inbound", "outbound"]
Side = Literal["downstream", "upstream"]


class AccessEvent(Enum):
    """What the line reports. Values are ztunnel's messages."""

    OPENED = "connection opened"
    COMPLETE = "connection complete"
    FAILED = "connection failed"
    """Refused before anything was dialled."""


_COMPLETE = AccessEvent.COMPLETE  # members of an enum are slower to find


# No slots: the texts are kept in the instance, which all connections between the same ends share.
@dataclass(frozen=True)
class AccessPeer:
    """Who one side of a connection is, as the log names it; empty: not known. ``identity`` only when mutual TLS proved it."""

    workload: str = ""
    namespace: str = ""
    cluster: str = ""
    identity: SpiffeId | None = None

    @classmethod
    def of(cls, workload: Workload | None, identity: SpiffeId | None = None) -> AccessPeer:
        if workload is None:
            return cls(identity=identity)
        return cls(workload.name or workload.canonical_name, workload.namespace, workload.cluster_id, identity)

    @cached_property
    def plain_source(self) -> str:
        """Each field with a blank behind it."""
        return _plain_named("src", self)

    @cached_property
    def plain_destination(self) -> str:
        return _plain_named("dst", self)


# A named tuple rather than a frozen dataclass, which sets every field by a call.
class AccessRecord(NamedTuple):
    """``bytes_sent``/``bytes_recv`` as ztunnel counts them: outbound sent = application to peer, inbound sent = the application's answer.

    ``destination_address`` is the next hop that was dialled (outbound), the pod's own address (inbound); ``hbone_address`` the CONNECT
    authority. ``ended`` is Unix time in seconds, ``duration`` seconds.
    """

    event: AccessEvent
    direction: Direction
    source_address: SocketAddress | None
    source: AccessPeer
    destination_address: SocketAddress | None
    destination: AccessPeer
    ended: float
    duration: float = 0.0
    hbone_address: str = ""
    service: str = ""
    bytes_sent: int = 0
    bytes_recv: int = 0
    error: str | None = None
    response_flags: str = "-"
    policy: str | None = None
    rule: int | None = None
    because: str | None = None
    closed_first: Side | None = None

    @property
    def level(self) -> str:
        """``debug`` when opened, ``warn`` when refused early, ``error`` when it ended with one, else ``info``."""
        return _level(self.event, self.error)


def _level(event: AccessEvent, error: str | None) -> str:
    if event is _COMPLETE:
        return "info" if error is None else "error"
    return "debug" if event is AccessEvent.OPENED else "warn"


def format_plain(record: AccessRecord) -> str:
    """One line with its newline. Every value that others may choose is escaped."""
    # Unpacked, and one text after the other: this runs for every connection, and attributes and lists cost more than the text.
    event, direction, client, source, server, destination, ended, duration, hbone_address, service, sent, received, error, *_ = record
    line = f"{timestamp(ended)}\t{_level(event, error)}\t{SCOPE}\t{event._value_}\t"
    if client is not None:
        line += f"src.addr={client} "
    line += source.plain_source
    if server is not None:
        line += f"dst.addr={server} "
    if hbone_address or service:
        line += _plain_target(hbone_address, service)
    line += f'{destination.plain_destination}direction="{direction}"'
    if event is _COMPLETE:
        line += f' bytes_sent={sent} bytes_recv={received} duration="{round(duration * 1000)}ms"'
    if error is not None:
        line += f" error={quoted(error)}"
    return f"{line}{_plain_decision(record[13:])}\n"


def format_json(record: AccessRecord) -> str:
    """The same as one JSON object: ``level``, ``time``, ``scope``, ``message``, then the fields; one line with its newline."""
    fields: dict[str, Any] = {
        "level": record.level,
        "time": timestamp(record.ended),
        "scope": SCOPE,
        "message": record.event.value,
    }
    _json_peer(fields, "src", record.source_address, record.source)
    _json_peer(fields, "dst", record.destination_address, record.destination)
    if record.hbone_address:
        fields["dst.hbone_addr"] = record.hbone_address
    if record.service:
        fields["dst.service"] = record.service
    fields["direction"] = record.direction
    if record.event is AccessEvent.COMPLETE:
        fields |= {"bytes_sent": record.bytes_sent, "bytes_recv": record.bytes_recv, "duration": f"{round(record.duration * 1000)}ms"}
    if record.error is not None:
        fields["error"] = record.error
    fields.update(_decision(record))
    return msgspec.json.encode(fields).decode() + "\n"


def _decision(record: AccessRecord) -> list[tuple[str, str | int]]:
    fields: list[tuple[str, str | int]] = []
    if record.response_flags != "-":
        fields.append(("response_flags", record.response_flags))
    if record.policy is not None:
        fields.append(("policy", record.policy))
    if record.rule is not None:
        fields.append(("rule", record.rule))
    if record.because is not None:
        fields.append(("because", record.because))
    if record.closed_first is not None:
        fields.append(("closed_first", record.closed_first))
    return fields


@lru_cache(maxsize=1024)
def _plain_decision(fields: tuple[Any, ...]) -> str:
    """The last fields of a record, each with a blank before it; most connections share them."""
    flags, *others = fields
    text = "" if flags == "-" else f" response_flags={quoted(flags)}"
    named = zip(AccessRecord._fields[14:], others, strict=True)
    return text + "".join([f" {name}={_plain_value(value)}" for name, value in named if value is not None])


def _plain_value(value: str | int) -> str:
    return quoted(value) if isinstance(value, str) else str(value)


@lru_cache(maxsize=4096)
def _plain_target(hbone_address: str, service: str) -> str:
    """What a tunnel is asked for, each field with a blank behind it."""
    text = ""
    if hbone_address:
        # Bare like the other addresses; but it is the peer's text, so anything that is not one is quoted.
        bare = hbone_address.isascii() and hbone_address.isprintable() and not set(' "\\=') & set(hbone_address)
        text = f"dst.hbone_addr={hbone_address if bare else quoted(hbone_address)} "
    return f"{text}dst.service={quoted(service)} " if service else text


def _plain_named(side: str, peer: AccessPeer) -> str:
    """What lines about the same workload have in common, each field with a blank behind it."""
    text = f"{side}.workload={quoted(peer.workload)} " if peer.workload else ""
    if peer.namespace:
        text += f"{side}.namespace={quoted(peer.namespace)} "
    if peer.cluster:
        text += f"{side}.cluster={quoted(peer.cluster)} "
    if peer.identity is not None:
        text += f"{side}.identity={quoted(str(peer.identity))} "
    return text


def _json_peer(fields: dict[str, Any], side: str, address: SocketAddress | None, peer: AccessPeer) -> None:
    if address is not None:
        fields[f"{side}.addr"] = str(address)
    if peer.workload:
        fields[f"{side}.workload"] = peer.workload
    if peer.namespace:
        fields[f"{side}.namespace"] = peer.namespace
    if peer.cluster:
        fields[f"{side}.cluster"] = peer.cluster
    if peer.identity is not None:
        fields[f"{side}.identity"] = str(peer.identity)


class RecordLog(Protocol):
    """Where records go: an `AccessLog`, as who leaves records knows it."""

    def wants(self, level: str, /) -> bool:
        """Ask before building a record that is seldom written (``debug``)."""

    def write(self, record: AccessRecord) -> None: ...


class AccessLog:
    """Writes records: lines of one turn of the event loop leave in one write, none later than that turn's end.

    ``call_soon`` is the loop's own (`Reactor.call_soon`); ``wanted`` says whether records of a level are written at all.
    """

    def __init__(
        self, call_soon: Callable[[Callable[[], None]], object], output: LogOutput, *, wanted: Callable[[str], bool], as_json: bool = False
    ) -> None:
        self._call_soon = call_soon
        self.wants = wanted
        self._format = format_json if as_json else format_plain
        self._output = output
        self._lines: list[str] = []

    def write(self, record: AccessRecord) -> None:
        if not self.wants(_level(record.event, record.error)):
            return
        if not self._lines:
            self._call_soon(self.flush)
        self._lines.append(self._format(record))

    def flush(self) -> None:
        """Write what is buffered. A log that can't be written costs its lines, never the connections."""
        self._output.write("".join(self._lines))
        self._lines.clear()
        self._output.flush()
