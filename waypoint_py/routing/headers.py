"""Header changes of routes and destinations: compiled with their operators, applied to requests, responses and local replies.

Order within one set of changes: remove, set, add; of several sets: the route's, then the destination's, whose word is the last. (Envoy
has it so for a single destination, and the other way round among several.) A value that renders empty changes nothing, as with Envoy.
Framing and hop-by-hop headers, and pseudo-headers, are never touched: the codecs own the former, and the authority has its own field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mesh.http.message import Message
from mesh.model.l7.routing import HeaderChanges
from mesh.telemetry.operators import Facts, Format, InvalidFormat, compile_header_value

_UNTOUCHED: Final = frozenset(
    (
        "connection",
        "content-length",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "transfer-encoding",
        "upgrade",
    )
)
"""What would contradict the framing of the message that carries it."""
_AUTHORITY: Final = (":authority", "host")


@dataclass(frozen=True, slots=True)
class CompiledChanges:
    """``authority``: what a set or add of ``host`` asks the authority to become; empty: nothing. ``broken``: why values are not as
    written; nothing of the changes is applied then, and whoever compiled them must not let the message pass."""

    remove: frozenset[bytes] = frozenset()
    set: tuple[tuple[bytes, bytes | Format], ...] = ()
    add: tuple[tuple[bytes, bytes | Format], ...] = ()
    authority: bytes = b""
    broken: str = ""

    def __bool__(self) -> bool:
        return bool(self.remove or self.set or self.add)

    def apply(self, message: Message, facts: Facts) -> None:
        """Operators do not see what is removed, and do see what is set as it was before (Envoy's order)."""
        if self.remove:
            message.headers = [pair for pair in message.headers if pair[0] not in self.remove]
        replaced = [(name, value) for name, value in _rendered(self.set, facts) if value]
        added = [(name, value) for name, value in _rendered(self.add, facts) if value]
        if replaced:
            gone = {name for name, _ in replaced}
            message.headers = [pair for pair in message.headers if pair[0] not in gone]
        message.headers += replaced
        message.headers += added


NO_CHANGES: Final = CompiledChanges()


def compile_changes(changes: HeaderChanges) -> CompiledChanges:
    """Ready to be applied; never raises."""
    if not (changes.remove or changes.set or changes.add):
        return NO_CHANGES
    try:
        return CompiledChanges(
            frozenset(name.encode() for name in changes.remove if _is_ours(name)),
            tuple((name.encode(), _value(value)) for name, value in dict(changes.set).items() if _is_ours(name)),
            tuple((name.encode(), _value(value)) for name, value in changes.add if _is_ours(name)),
            _find_authority(changes).encode(),
        )
    except InvalidFormat as exc:
        return CompiledChanges(broken=f"invalid header value: {exc}")


def _is_ours(name: str) -> bool:
    return not name.startswith(":") and name not in _UNTOUCHED


def _find_authority(changes: HeaderChanges) -> str:
    """A set goes before an add (Istio)."""
    return next((value for pairs in (changes.set, changes.add) for name, value in pairs if name in _AUTHORITY), "")


def _value(text: str) -> bytes | Format:
    compiled = compile_header_value(text)
    return compiled if compiled.literal is None else _clean(compiled.literal)


def _rendered(pairs: tuple[tuple[bytes, bytes | Format], ...], facts: Facts) -> list[tuple[bytes, bytes]]:
    return [(name, value if isinstance(value, bytes) else _clean(value.render(facts))) for name, value in pairs]


_CONTROL: Final = bytes(range(0x20)) + b"\x7f"


def _clean(text: str) -> bytes:
    """A header's value: no control character gets in, wherever it comes from."""
    return text.encode("utf-8", "surrogateescape").translate(None, _CONTROL).strip()
