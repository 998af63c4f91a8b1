"""The living connections of a mover: what each is, who may end it, and the one record it leaves when it ends.

Inbound connections are entered before their policy is asked (a change that comes in between is then seen), and asked again at every
change of policies or of the workload's list of policies: the living ones that are refused now end, no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import trio

from mesh.authz.evaluate import AppliedPolicies, Connection, Denial, Permit, authorize, is_undecided
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.service import Service
from mesh.model.workload import Workload
from mesh.reactor.relay import Relay, RelayResult
from mesh.telemetry.access import AccessEvent, AccessPeer, AccessRecord, Direction, RecordLog, Side
from mesh.telemetry.metrics import Series, TcpMetrics, TcpSeries, tcp_labels

POLICY_CHANGED = "connection closed due to policy change"
DRAINED = "connection closed due to connection drain"
_MOST_KNOWN_ENDS = 4096

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a connection ended other than well, and the response flag that metrics and log show for it (Istio's)."""

    because: str
    flags: str = "CONNECT"


@dataclass(slots=True, eq=False)
class Living:
    """One connection in the agent's care. Filled in as its facts become known; ``finish`` it exactly once through the ledger."""

    pod: str
    direction: Direction
    client: SocketAddress
    destination: SocketAddress
    """Outbound: the next hop that is dialled. Inbound: the pod's own address, or the original destination of plaintext."""
    started: float
    source: Workload | None = None
    target: Workload | None = None
    service: Service | None = None
    source_identity: SpiffeId | None = None
    target_identity: SpiffeId | None = None
    authority: str = ""
    because: str = ""
    facts: Connection | None = None
    applied: AppliedPolicies | None = None
    verdict: Permit | Denial | None = None
    relay: Relay | None = None
    relay_from: Side = "downstream"
    """Which side's bytes the relay counts as sent: the side of the socket where a tunnel is served, else downstream."""
    stop: Callable[[str], None] | None = None
    """Ends the connection before its relay runs, whether it is entered yet or not; afterwards the relay's own ``abort`` does."""
    ended_by: Failure | None = None
    """Set before the connection is ended from our side: what its record will say."""
    ends: _Ends | None = None
    """Set when it is entered."""
    counted: tuple[int, int] = (0, 0)
    """Bytes to the server and to the client that metrics have seen."""

    @property
    def protocol(self) -> str:
        """``HBONE`` or ``TCP``, as config_dump says it."""
        return "HBONE" if self.authority else "TCP"


class _Ends(NamedTuple):
    """What all connections between the same ends have in common, put together once for all of them."""

    series: TcpSeries
    sockets_open: Series
    source: AccessPeer
    destination: AccessPeer
    service: str
    held: tuple[object, ...]
    """Whose ids the ends are known by, so that no id gets another meaning."""


class Reauthorization(NamedTuple):
    """How many connections a change of policy ended, and how many wait for a policy to arrive."""

    ended: int
    undecided: int


class Ledger:
    """All living connections of this mover, by pod."""

    def __init__(self, metrics: TcpMetrics, log: RecordLog, now: Callable[[], float]) -> None:
        self._metrics = metrics
        self._log = log
        self._now = now
        self._living: dict[str, set[Living]] = {}
        self._known_ends: dict[tuple[object, ...], _Ends] = {}
        """By direction, identities and the ids of workloads and service."""
        self._empty = trio.Event()
        self.total = 0
        """How many connections live, of all pods."""
        self.on_count: Callable[[str, int], None] = lambda pod, living: None
        """Told the number of a pod's living connections whenever it changes."""

    def open(self, living: Living) -> None:
        """Enter a connection: from here on it counts, can be ended by a change of policy, and will leave a record."""
        ends = living.ends = self._ends_of(living)
        ends.series.opened += 1
        ends.sockets_open.value += 1
        of_pod = self._living.get(living.pod)
        if of_pod is None:
            of_pod = self._living[living.pod] = set()
        of_pod.add(living)
        self.total += 1
        self.on_count(living.pod, len(of_pod))
        if self._log.wants("debug"):
            self._log.write(self._record(living, AccessEvent.OPENED, None, None))

    def finish(self, living: Living, result: RelayResult | None = None, failure: Failure | None = None) -> None:
        """Leave the ledger with a record. What ended it from our side wins over what the relay saw of it."""
        of_pod, ends = self._living.get(living.pod), living.ends
        if of_pod is None or living not in of_pod or ends is None:
            return
        of_pod.remove(living)
        self.total -= 1
        living.stop = None  # whoever it belongs to is free to go without the garbage collector
        failure = living.ended_by or failure or (Failure(result.error) if result is not None and result.error else None)
        self._count_bytes(living, result)
        ends.series.close(failure.flags if failure is not None else "-")
        ends.sockets_open.value -= 1
        self._log.write(self._record(living, AccessEvent.COMPLETE, result, failure))
        if not of_pod:
            del self._living[living.pod]
        if not self._living:
            self._empty.set()
        self.on_count(living.pod, len(of_pod))

    def refuse(self, living: Living, because: str) -> None:
        """Record a connection that ended before anything was decided or dialled for it: one line, no traffic metric (as ztunnel)."""
        living.stop = None
        self._log.write(self._record(living, AccessEvent.FAILED, None, Failure(because)))

    def end(self, living: Living, failure: Failure) -> None:
        """End a living connection from our side, with this reason in its record."""
        living.ended_by = living.ended_by or failure
        if living.relay is not None:
            living.relay.abort(failure.because)
        elif living.stop is not None:
            living.stop(failure.because)

    def guarded(self, living: Living, step: Callable[[T], None]) -> Callable[[T], None]:
        """``step`` as a callback: if it raises, this connection ends with a record. Whoever calls back then reports the exception and
        clears up its own side, as reactor, link, pool and waiting room do."""

        def take(value: T) -> None:
            try:
                step(value)
            except Exception as exc:
                self.end(living, Failure(f"internal error: {exc!r}"))
                raise

        return take

    def reauthorize(self, policies_for: Callable[[str], AppliedPolicies | None], *, final: bool) -> Reauthorization:
        """Ask policy anew for every inbound connection whose pod's applied policies changed.

        ``policies_for(pod uid)`` gives the policies that apply now, None if the pod's workload is not known: its connections stay. A
        connection that is refused only because a policy has not arrived stays undecided, until ``final``.
        """
        ended = undecided = 0
        for pod, of_pod in list(self._living.items()):
            applied = policies_for(pod)
            if applied is None:
                continue
            for living in list(of_pod):
                if living.facts is None or living.applied is applied:
                    continue
                verdict = authorize(applied, living.facts)
                if is_undecided(applied, verdict) and not final:
                    undecided += 1
                    continue
                living.applied, living.verdict = applied, verdict
                if isinstance(verdict, Denial):
                    self.end(living, Failure(POLICY_CHANGED, "DENY"))
                    ended += 1
        return Reauthorization(ended, undecided)

    def end_all(self, pod: str | None, failure: Failure) -> None:
        """End every connection, of one pod or of all."""
        for living in [living for living in self.living() if pod is None or living.pod == pod]:
            self.end(living, failure)

    def living(self) -> Iterator[Living]:
        """Every living connection."""
        for of_pod in list(self._living.values()):
            yield from list(of_pod)

    def _ends_of(self, living: Living) -> _Ends:
        held = living.source, living.target, living.service
        key = living.direction, living.source_identity, living.target_identity, id(held[0]), id(held[1]), id(held[2])
        ends = self._known_ends.get(key)
        if ends is None:
            if len(self._known_ends) >= _MOST_KNOWN_ENDS:
                self._known_ends.clear()  # ends that have changed since take room; living connections hold their own themselves
            ends = self._known_ends[key] = self._describe(living, held)
        return ends

    def _describe(self, living: Living, held: tuple[object, ...]) -> _Ends:
        reporter: Literal["source", "destination"] = "source" if living.direction == "outbound" else "destination"
        labels = tcp_labels(
            reporter,
            source=living.source,
            destination=living.target,
            service=living.service,
            source_identity=living.source_identity,
            mutual_tls=living.source_identity is not None,
        )
        return _Ends(
            self._metrics.series(labels),
            self._metrics.sockets_open[reporter],
            *_named(living),
            held,
        )

    def empty(self) -> trio.Event:
        """Set as soon as no connection lives."""
        self._empty = trio.Event()
        if not self._living:
            self._empty.set()
        return self._empty

    def count(self, pod: str) -> int:
        """How many connections of this pod live."""
        return len(self._living.get(pod, ()))

    def count_live_bytes(self) -> None:
        """Add what living connections moved since the last time to their series: done when metrics are read, never per chunk."""
        for living in self.living():
            self._count_bytes(living, None)

    def _count_bytes(self, living: Living, result: RelayResult | None) -> None:
        moved = result if result is not None else living.relay
        if living.ends is None or moved is None:
            return
        to_server, to_client = (moved.sent, moved.received) if living.relay_from == "downstream" else (moved.received, moved.sent)
        before_server, before_client = living.counted
        living.counted = (to_server, to_client)
        # Istio counts "received" client to server, for both reporters.
        series = living.ends.series
        series.received += to_server - before_server
        series.sent += to_client - before_client

    def _record(self, living: Living, event: AccessEvent, result: RelayResult | None, failure: Failure | None) -> AccessRecord:
        verdict, ends = living.verdict, living.ends
        source, destination, service = ends[2:5] if ends is not None else _named(living)
        sent, received = living.counted if living.direction == "outbound" else reversed(living.counted)
        # By position, in the order of the fields: that many names would cost half as much again.
        return AccessRecord(
            event,
            living.direction,
            living.client,
            source,
            living.destination,
            destination,
            time.time(),
            self._now() - living.started,
            living.authority,
            service,
            sent,
            received,
            failure.because if failure is not None else None,
            failure.flags if failure is not None else "-",
            verdict.policy if verdict is not None else None,
            verdict.rule if verdict is not None else None,
            (verdict.because if verdict is not None else living.because) or None,
            result.first_closed if result is not None else None,
        )


def _named(living: Living) -> tuple[AccessPeer, AccessPeer, str]:
    """Source, destination and service, as the log names them."""
    return (
        AccessPeer.of(living.source, living.source_identity),
        AccessPeer.of(living.target, living.target_identity),
        living.service.hostname if living.service is not None else "",
    )
