"""A ReferenceGrant of the Gateway API: what objects of other namespaces may refer to in this one. Grants only add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mesh.kube.fields import Fields, Text
from mesh.kube.objects import KubeObject, SourceProblem

MAX_ITEMS: Final = 16
"""As the Gateway API's schema."""


@dataclass(frozen=True, slots=True)
class GrantedFrom:
    """Who may refer: a kind (``group`` empty: the core group) in a namespace."""

    group: str
    kind: str
    namespace: str


@dataclass(frozen=True, slots=True)
class GrantedTo:
    """What may be referred to. ``name`` empty: every object of the kind."""

    group: str
    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class KubeReferenceGrant:
    namespace: str
    name: str
    sources: tuple[GrantedFrom, ...]
    targets: tuple[GrantedTo, ...]

    def allows(self, source: GrantedFrom, target: GrantedTo) -> bool:
        """Whether ``source`` may refer to ``target``, one object of this grant's namespace."""
        return source in self.sources and (target in self.targets or GrantedTo(target.group, target.kind, "") in self.targets)


def is_granted(grants: Iterable[KubeReferenceGrant], source: GrantedFrom, namespace: str, target: GrantedTo) -> bool:
    """Whether ``source`` may refer to the object ``target`` in ``namespace``. Within a namespace nobody needs a grant."""
    return source.namespace == namespace or any(grant.namespace == namespace and grant.allows(source, target) for grant in grants)


def read_reference_grant(obj: KubeObject) -> tuple[KubeReferenceGrant, tuple[SourceProblem, ...]]:
    """The grant and every mistake in it; with a mistake it is not for use."""
    fields = Fields(obj)
    return parse_reference_grant(fields), tuple(fields.problems)


def parse_reference_grant(fields: Fields) -> KubeReferenceGrant:
    """``fields`` of the whole object."""
    obj = fields.whole
    spec = fields.mapping("spec", required=True) or Fields(obj, ("spec",), {}, fields.problems)
    spec.refuse_unknown("from", "to")
    sources = spec.mappings("from", required=True, empty="a grant says from where", most=MAX_ITEMS)
    targets = spec.mappings("to", required=True, empty="a grant says to what", most=MAX_ITEMS)
    return KubeReferenceGrant(obj.namespace, obj.name, tuple(map(_read_from, sources)), tuple(map(_read_to, targets)))


def _read_from(item: Fields) -> GrantedFrom:
    item.refuse_unknown("group", "kind", "namespace")
    return GrantedFrom(
        group=item.string("group", required=True, text=_GROUP),
        kind=item.string("kind", required=True, text=_SOMETHING),
        namespace=item.string("namespace", required=True, text=_SOMETHING),
    )


def _read_to(item: Fields) -> GrantedTo:
    item.refuse_unknown("group", "kind", "name")
    return GrantedTo(
        group=item.string("group", required=True, text=_GROUP),
        kind=item.string("kind", required=True, text=_SOMETHING),
        name=item.string("name"),
    )


_GROUP: Final = Text(lambda group: None, {"maxLength": 253})
_SOMETHING: Final = Text(lambda text: None if text else "is empty", {"minLength": 1, "maxLength": 253})
