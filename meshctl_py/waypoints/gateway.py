"""A waypoint as the Gateway that asks for it. Pure."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ruamel.yaml import YAML

from mesh.kube.directory import find_name_mistake
from mesh.kube.gatewayapi.gateway import GROUP, WAYPOINT_CLASS
from mesh.model.labels import REVISION, TRAFFIC_TYPES, WAYPOINT_FOR
from mesh.model.ports import INBOUND_HBONE

DEFAULT_NAME: Final = "waypoint"
PROGRAMMED: Final = "Programmed"
_PADDING: Final = 5
"""Blanks between columns."""


class InvalidWaypoint(Exception):
    """What was asked for is no waypoint; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Found:
    """A waypoint that is there."""

    namespace: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Mapping[str, str], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def is_programmed(self) -> bool:
        return any(item.get("type") == PROGRAMMED and item.get("status") == "True" for item in self.conditions)

    @property
    def revision(self) -> str:
        return self.labels.get(REVISION) or "default"

    def told(self) -> Mapping[str, str]:
        """The condition that says how it is: the one about being programmed, else the last there is."""
        programmed = next((item for item in self.conditions if item.get("type") == PROGRAMMED), None)
        return programmed or (self.conditions[-1] if self.conditions else {})


def make_gateway(name: str, namespace: str, traffic: str, revision: str) -> dict[str, Any]:
    """The object; empty texts are left out. Raises InvalidWaypoint."""
    if name == "none":
        raise InvalidWaypoint("invalid name provided for waypoint, 'none' is a reserved value")
    if name and (mistake := find_name_mistake(name)):
        raise InvalidWaypoint(mistake)
    if traffic and traffic not in TRAFFIC_TYPES:
        raise InvalidWaypoint(f"invalid traffic type: {traffic}. Valid options are: [{' '.join(TRAFFIC_TYPES)}]")
    labels = {key: value for key, value in ((WAYPOINT_FOR, traffic), (REVISION, revision)) if value}
    metadata: dict[str, Any] = {"name": name or DEFAULT_NAME}
    if namespace:
        metadata["namespace"] = namespace
    if labels:
        metadata["labels"] = labels
    # The protocol's own word, which no API server checks.
    listener = {"name": "mesh", "port": INBOUND_HBONE, "protocol": "HBONE"}
    spec = {"gatewayClassName": WAYPOINT_CLASS, "listeners": [listener]}
    return {"apiVersion": f"{GROUP}/v1", "kind": "Gateway", "metadata": metadata, "spec": spec}


def as_yaml(gateway: Mapping[str, Any]) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    out = io.StringIO()
    yaml.dump(dict(gateway), out)
    return out.getvalue()


def list_table(found: Sequence[Found], *, namespaces: bool) -> str:
    rows: list[tuple[str, ...]] = [("NAMESPACE", "NAME", "REVISION", "TRAFFIC TYPE", "PROGRAMMED")]
    for each in found:
        programmed = next((item.get("status", "False") for item in each.conditions if item.get("type") == PROGRAMMED), "False")
        rows.append((each.namespace, each.name, each.revision, each.labels.get(WAYPOINT_FOR) or "none", programmed))
    return _tabulate(rows if namespaces else [row[1:] for row in rows])


def status_table(found: Sequence[Found], *, namespaces: bool) -> str:
    rows: list[tuple[str, ...]] = [("NAMESPACE", "NAME", "STATUS", "TYPE", "REASON", "MESSAGE")]
    for each in found:
        told = each.told()
        rows.append((each.namespace, each.name, *(told.get(key, "") for key in ("status", "type", "reason", "message"))))
    return _tabulate(rows if namespaces else [row[1:] for row in rows])


def _tabulate(rows: Sequence[Sequence[str]]) -> str:
    """As Go's tabwriter writes it: every cell but the last of a line is as wide as its column, and the padding."""
    widths = [max(len(cell) for cell in column) + _PADDING for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Iterable[str], widths: Sequence[int]) -> str:
    *cells, last = row
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)) + last
