"""Changes to headers as objects ask for them, down to what a waypoint does: names in lower case, values checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields, Text
from mesh.model.l7.routing import HeaderChanges
from mesh.telemetry.operators import InvalidFormat, compile_header_value

_TOKEN: Final = r"[A-Za-z0-9!#$%&'*+\-.^_`|~]+"
_NAME: Final = re.compile(_TOKEN)
_VALUE: Final = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
MAX_NAMES: Final = 512


_UNCHANGED: Final = HeaderChanges()


@dataclass(frozen=True, slots=True)
class HeaderEdits:
    """``authority`` replaces the request's: what asks for another ``Host`` or ``:authority``; ``""``: nothing does."""

    request: HeaderChanges = _UNCHANGED
    response: HeaderChanges = _UNCHANGED
    authority: str = ""


NO_EDITS: Final = HeaderEdits()


def read_header_edits(fields: Fields) -> HeaderEdits:
    """Istio's Headers."""
    fields.refuse_unknown("request", "response")
    request, authority = _read_operations(fields.mapping("request"), authority=True)
    response, _ = _read_operations(fields.mapping("response"), authority=False)
    return HeaderEdits(request, response, authority)


def _read_operations(fields: Fields | None, *, authority: bool) -> tuple[HeaderChanges, str]:
    if fields is None:
        return HeaderChanges(), ""
    fields.refuse_unknown("set", "add", "remove")
    replaced, added = _read_values(fields, "set", authority=authority), _read_values(fields, "add", authority=authority)
    removed = fields.strings("remove", text=_REMOVED)
    wanted = [(key, name, values[name]) for key, values in (("set", replaced), ("add", added)) for name in values if is_authority(name)]
    for key, name, _ in wanted[1:]:
        fields.complain(key, f"the authority is set in '{wanted[0][0]}' already", name)
    return make_changes(replaced, added, removed), wanted[0][2] if wanted else ""


def _read_values(fields: Fields, key: str, *, authority: bool) -> Mapping[str, str]:
    values = fields.string_map(key)
    for name, value in values.items():
        mistake = (None if authority and is_authority(name) else _find_name_mistake(name)) or find_value_mistake(value)
        if mistake:
            fields.complain(key, mistake, name)
    return values


def make_changes(replaced: Mapping[str, str], added: Mapping[str, str], removed: tuple[str, ...]) -> HeaderChanges:
    """In the order in which they are made; what concerns the authority is left out."""
    return HeaderChanges(set=_sorted(replaced), add=_sorted(added), remove=tuple(name.lower() for name in removed if not is_internal(name)))


def _sorted(values: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name.lower(), value) for name, value in values.items() if not is_internal(name)))


def is_authority(name: str) -> bool:
    return name.lower() in ("host", ":authority")


def is_internal(name: str) -> bool:
    """Whether it is no header that can be changed as one."""
    return name.startswith(":") or name.lower() == "host"


def find_control_mistake(text: str) -> str | None:
    """Of a text that becomes part of a header: nobody could send it."""
    return "has a character that no header can carry" if any(char < " " or char == "\x7f" for char in text) else None


def is_token(name: str) -> bool:
    """Whether it can be a header's name (RFC 9110)."""
    return _NAME.fullmatch(name) is not None


def find_value_mistake(value: str) -> str | None:
    """Why a header can't have this value, which may hold Envoy's substitutions."""
    if _VALUE.fullmatch(value) is None:
        return "a header's value has no control characters"
    return find_format_mistake(value)


def find_format_mistake(value: str) -> str | None:
    try:
        compile_header_value(value)
    except InvalidFormat as exc:
        return f"{exc}; a percent sign is written '%%'"
    return None


def _find_name_mistake(name: str) -> str | None:
    if is_internal(name):
        return f"'{name}' can't be changed here"
    return None if is_token(name) else f"'{name}' is no name of a header"


_REMOVED: Final = Text(_find_name_mistake, {"minLength": 1})
