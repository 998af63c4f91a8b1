"""What the translation of a namespace's workloads depends on besides the workloads themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from istiod_py.translate.peer_authentication import NamespaceMtls
from mesh.kube.service import KubeService
from mesh.kube.serviceentry import KubeServiceEntry


@dataclass(frozen=True, slots=True)
class SelectingEntry:
    """A ServiceEntry with a ``workloadSelector``, and those of its hosts that are its own."""

    entry: KubeServiceEntry
    hosts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Of one namespace. Comparing two is cheap where nothing changed: what they hold is then the same instances."""

    services: tuple[KubeService, ...] = ()
    """Those with a selector."""
    entries: tuple[SelectingEntry, ...] = ()
    selectors: tuple[tuple[str, Mapping[str, str]], ...] = ()
    """(policy key, selector) of the policies that workloads of the namespace may have to name."""
    mtls: NamespaceMtls = field(default_factory=NamespaceMtls)
    network: str = ""

    def policies_for(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """The policies that a workload with these labels names."""
        selected = [key for key, selector in self.selectors if selector.items() <= labels.items()]
        return tuple(sorted((*selected, *self.mtls.names_for(labels))))
