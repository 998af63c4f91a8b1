"""What translation needs to know about the mesh as a whole, and the conditions it reports on objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from mesh.model.identity import DEFAULT_TRUST_DOMAIN


@dataclass(frozen=True, slots=True)
class Config:
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    cluster_id: str = "Kubernetes"
    root_namespace: str = "istio-system"
    """Policies here, without a selector, are for the whole mesh."""
    domain_suffix: str = "cluster.local"
    """Of service hostnames: ``web.shop.svc.cluster.local``."""
    revisions: frozenset[str] = frozenset({"default"})
    """Names of this control plane in ``istio.io/rev`` labels: objects of Istio's kinds that name another one are not for it."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A status condition as Istio writes it on the object."""

    type: str
    status: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """What a route's status says of one of its parents (Gateway API's ``status.parents[]``). ``parent`` is the reference as the route has
    it; ``controller`` who says so."""

    parent: Mapping[str, object]
    controller: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AncestorStatus:
    """What a policy's status says of one object that it has to do with (Gateway API's ``status.ancestors[]``)."""

    ancestor: Mapping[str, object]
    controller: str
    conditions: tuple[Condition, ...]


StatusEntry: TypeAlias = Condition | ParentStatus | AncestorStatus
"""All that is said in an object's status. An empty tuple of them for an object: what was said before is withdrawn."""
