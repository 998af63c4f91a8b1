"""Answers about connections, kept for the next one that is like it until anything in the mesh changes.

All memos give what asking anew would give, always: they hold answers of one `MeshState.version` and forget all of them at the next. Every
effective change of a workload, service or policy makes a new version, so there is no rule to get wrong about what invalidates what. All
are bounded, since peers and applications choose what they ask for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from mesh.authz.evaluate import AppliedPolicies, Connection, Denial, Permit, authorize
from mesh.model.address import IpAddress, SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.route import Route
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.state.inbound import InboundRefusal, InboundTarget, resolve_inbound
from mesh.state.resolve import resolve
from mesh.state.store import MeshState
from mesh.wire.forwarded import parse_forwarded_host

ROUTES_KEPT: Final = 4096
"""By source and destination, of all pods of a node together."""
ADMISSIONS_KEPT: Final = 64
"""Of one peer; it names the ports of a pod, and the hostnames by which applications reached them."""
PEERS_KEPT: Final = 256
"""Whose admissions outlive their connection, for the next one."""


class RouteMemo:
    """`resolve`, but for a pair of source and destination that it has answered without throwing dice."""

    def __init__(self, state: MeshState) -> None:
        self._state = state
        self._version = state.version
        self._kept: dict[tuple[int, int], tuple[Workload, SocketAddress, Route]] = {}
        """By the identity of source and target, which are held here, so that no id gets another meaning: to hash an IP address costs
        more than all the rest of a hit."""

    def resolve(self, source: Workload, target: SocketAddress, rng: random.Random, unreachable: frozenset[str] = frozenset()) -> Route:
        """Where a connection goes. Quick when ``target`` is the very object of an earlier call, and nothing is said to be unreachable."""
        if unreachable:
            return resolve(self._state, source, target, rng, unreachable)
        state = self._state
        if state.version != self._version:
            self._version = state.version
            self._kept.clear()
        key = (id(source), id(target))
        kept = self._kept.get(key)
        if kept is not None:
            return kept[2]
        dice = _Dice(rng)
        route = resolve(state, source, target, dice)
        if not dice.thrown:
            if len(self._kept) >= ROUTES_KEPT:
                self._kept.clear()
            self._kept[key] = source, target, route
        return route


class _Dice(random.Random):
    """Another's random numbers, and whether any was asked for."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.thrown = False

    def random(self) -> float:  # all other methods that `resolve` uses are made of this one
        self.thrown = True
        return self._rng.random()


@dataclass(frozen=True, slots=True)
class Admission:
    """All that is decided about one request of a peer before its application is dialled."""

    target: InboundTarget
    source: Workload | None
    """The workload that the peer is, for telemetry."""
    service: Service | None
    facts: Connection
    applied: AppliedPolicies
    verdict: Permit | Denial


class PeerMemo:
    """An `AdmissionMemo` for each peer: most new connections are of one that was here before, when its last has been idle for long."""

    def __init__(self, state: MeshState) -> None:
        self._state = state
        self._version = state.version
        self._kept: dict[tuple[int, int, int], AdmissionMemo] = {}
        """By the identity of the three things that make a peer, which the memo holds, as in `RouteMemo`."""

    def of(self, client: IpAddress, identity: SpiffeId | None, local: IpAddress) -> AdmissionMemo:
        """For the requests of who proved ``identity`` from ``client`` to our ``local``. Quick when they are the very objects of an earlier
        call."""
        if self._version != self._state.version:
            self._version = self._state.version
            self._kept.clear()
        key = id(client), id(identity), id(local)
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= PEERS_KEPT:
                self._kept.clear()
            kept = self._kept[key] = AdmissionMemo(self._state, client, identity, local)
        return kept


class AdmissionMemo:
    """`resolve_inbound` and `authorize` for the requests of one peer: its address and identity are those of its connection."""

    def __init__(self, state: MeshState, client: IpAddress, identity: SpiffeId | None, local: IpAddress) -> None:
        self._state = state
        self._client = client
        self._identity = identity
        self._local = local
        self._version = state.version
        self._workload: Workload | None = None
        self._kept: dict[tuple[str, str | None], Admission | InboundRefusal] = {}

    def judge(self, workload: Workload, authority: str, forwarded: str) -> Admission | InboundRefusal:
        """Decide about one request to ``workload``, with its authority and its header of that name (empty for none)."""
        if self._version != self._state.version or self._workload is not workload:
            self._version, self._workload = self._state.version, workload
            self._kept.clear()
        key = authority, parse_forwarded_host(forwarded)
        kept = self._kept.get(key)
        if kept is None:
            if len(self._kept) >= ADMISSIONS_KEPT:
                self._kept.clear()
            kept = self._kept[key] = self._judge(workload, *key)
        return kept

    def _judge(self, workload: Workload, authority: str, host: str | None) -> Admission | InboundRefusal:
        state = self._state
        target = resolve_inbound(state, workload, authority, self._local)
        if isinstance(target, InboundRefusal):
            return target
        facts = Connection(self._client, self._identity, target.address)
        applied = state.policies_for(workload)
        return Admission(
            target,
            state.find_workload_of_peer(self._client, workload.network, self._identity),
            target.service or state.find_destination_service(workload, target.address.port, host),
            facts,
            applied,
            authorize(applied, facts),
        )
