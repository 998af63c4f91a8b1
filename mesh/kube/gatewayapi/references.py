"""What routes of every kind refer to: the parents they attach to, and the backends they send to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields, Text

GROUP: Final = "gateway.networking.k8s.io"
MAX_PARENTS: Final = 32
MAX_BACKENDS: Final = 16
MAX_WEIGHT: Final = 1_000_000
_LABEL: Final = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS_PATTERN: Final = rf"{_LABEL}(\.{_LABEL})*"
_DNS: Final = re.compile(_DNS_PATTERN)
_KIND: Final = re.compile("[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?")


@dataclass(frozen=True, slots=True)
class ParentRef:
    """``namespace`` empty: the route's own; ``port`` 0: every port."""

    group: str
    kind: str
    name: str
    namespace: str = ""
    section: str = ""
    port: int = 0

    def as_object(self) -> dict[str, object]:
        """As a status repeats it."""
        found: dict[str, object] = {"group": self.group, "kind": self.kind, "name": self.name}
        optional = {"namespace": self.namespace, "sectionName": self.section, "port": self.port}
        return found | {key: value for key, value in optional.items() if value}


@dataclass(frozen=True, slots=True)
class BackendRef:
    """``namespace`` empty: the route's own; ``port`` 0: none given."""

    group: str
    kind: str
    name: str
    namespace: str = ""
    port: int = 0
    weight: int = 1


def read_parents(spec: Fields) -> tuple[ParentRef, ...]:
    parents: list[ParentRef] = []
    for index, fields in enumerate(spec.mappings("parentRefs", most=MAX_PARENTS)):
        parent = _read_parent(fields)
        if parent in parents:
            spec.complain("parentRefs", "this parent is given twice: tell them apart by sectionName or port", index)
        parents.append(parent)
    return tuple(parents)


def _read_parent(fields: Fields) -> ParentRef:
    fields.refuse_unknown("group", "kind", "name", "namespace", "sectionName", "port")
    return ParentRef(
        group=fields.string("group", GROUP, text=GROUP_NAME),
        kind=fields.string("kind", "Gateway", text=KIND_NAME),
        name=fields.string("name", required=True, text=_NAME),
        namespace=fields.string("namespace", text=NAMESPACE),
        section=fields.string("sectionName", text=_DNS_NAME),
        port=fields.integer("port", low=1, high=65535),
    )


def read_backend(fields: Fields, *further: str, weighted: bool = True) -> BackendRef:
    """``further``: what ``fields`` may have besides."""
    fields.refuse_unknown("group", "kind", "name", "namespace", "port", *(("weight",) if weighted else ()), *further)
    found = BackendRef(
        group=fields.string("group", text=GROUP_NAME),
        kind=fields.string("kind", "Service", text=KIND_NAME),
        name=fields.string("name", required=True, text=_NAME),
        namespace=fields.string("namespace", text=NAMESPACE),
        port=fields.integer("port", low=1, high=65535),
        weight=fields.integer("weight", 1, low=0, high=MAX_WEIGHT) if weighted else 1,
    )
    if (found.group, found.kind) == ("", "Service") and "port" not in fields:
        fields.complain(None, "'port' is required for a Service")
    return found


def read_hostnames(spec: Fields, *, most: int) -> tuple[str, ...]:
    return spec.strings("hostnames", most=most, text=HOSTNAME)


def _find_dns_mistake(text: str) -> str | None:
    return None if len(text) <= 253 and _DNS.fullmatch(text) else f"expected lower case letters, digits, '-' and '.', found '{text[:80]}'"


def _find_group_mistake(text: str) -> str | None:
    return _find_dns_mistake(text) if text else None


def _find_kind_mistake(text: str) -> str | None:
    return None if len(text) <= 63 and _KIND.fullmatch(text) else f"'{text[:80]}' is no kind"


def _find_name_mistake(text: str) -> str | None:
    return None if 0 < len(text) <= 253 else f"a name has 1 to 253 characters, this one {len(text)}"


def _find_namespace_mistake(text: str) -> str | None:
    return None if len(text) <= 63 and re.fullmatch(_LABEL, text) else f"'{text[:80]}' is no name of a namespace"


def _find_hostname_mistake(text: str) -> str | None:
    return _find_dns_mistake(text.removeprefix("*."))


GROUP_NAME: Final = Text(_find_group_mistake, {"maxLength": 253, "pattern": f"^$|^{_DNS_PATTERN}$"})
KIND_NAME: Final = Text(_find_kind_mistake, {"minLength": 1, "maxLength": 63, "pattern": f"^{_KIND.pattern}$"})
NAMESPACE: Final = Text(_find_namespace_mistake, {"minLength": 1, "maxLength": 63, "pattern": f"^{_LABEL}$"})
HOSTNAME: Final = Text(_find_hostname_mistake, {"minLength": 1, "maxLength": 253, "pattern": rf"^(\*\.)?{_DNS_PATTERN}$"})
PRECISE_HOSTNAME: Final = Text(_find_dns_mistake, {"minLength": 1, "maxLength": 253, "pattern": f"^{_DNS_PATTERN}$"})
_DNS_NAME: Final = PRECISE_HOSTNAME
RULE_NAME: Final = PRECISE_HOSTNAME
_NAME: Final = Text(_find_name_mistake, {"minLength": 1, "maxLength": 253})
