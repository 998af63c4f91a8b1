"""One leader among several replicas, by a Lease object: renewed while held, taken over once nobody renewed it for its duration.

As client-go does it: whether a lease has run out is judged by how long *we* saw it unchanged, never by comparing another machine's clock
with ours; every write carries the version that was read, so of two that try at once one is refused.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import trio

from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import mapping_at
from mesh.kube.resources import LEASES
from mesh.telemetry.log import get_logger

DURATION: Final = 15
"""Seconds (whole, as the API has it) without renewal after which another may take over."""
RENEW_WITHIN: Final = 10.0
"""Seconds without a successful renewal after which the leader stops leading: well before another may begin."""
RETRY: Final = 2.0
_RELEASE_TIMEOUT: Final = 2.0

_log = get_logger("lease")


@dataclass(frozen=True, slots=True)
class Observation:
    """A Lease as it was read, and since when (by our monotonic clock) it has been like this."""

    holder: str
    renewed: str
    duration: float
    since: float


def may_take(seen: Observation | None, identity: str, now: float) -> bool:
    """Whether to write ourselves in: there is no lease, it is ours, it was given back, or it ran out under our eyes."""
    if seen is None or seen.holder in ("", identity):
        return True
    return now - seen.since > seen.duration


class LeaderElection:
    """Runs a task on one replica at a time."""

    def __init__(self, client: ApiClient, namespace: str, name: str, identity: str, *, rng: random.Random | None = None) -> None:
        """``identity`` is unique among replicas, and of each start: a restarted replica must not take itself for its predecessor."""
        self._client = client
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._rng = rng or random.Random()
        self._seen: Observation | None = None
        self.leading = False

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled: whenever this replica leads, run ``lead``, and cancel it when it no longer does."""
        while True:
            if not await self._try():
                await trio.sleep(self._rng.uniform(RETRY / 2, RETRY))
                continue
            self.leading = True
            _log.info("leading", lease=self._name, identity=self._identity)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._renew, nursery.cancel_scope)
                    nursery.start_soon(lead)
            finally:
                self.leading = False
                with trio.move_on_after(_RELEASE_TIMEOUT, shield=True):
                    await self._release()
            _log.warning("lost", lease=self._name, identity=self._identity)

    async def _renew(self, scope: trio.CancelScope) -> None:
        deadline = trio.current_time() + RENEW_WITHIN
        while trio.current_time() < deadline:
            await trio.sleep(self._rng.uniform(RETRY / 2, RETRY))
            with trio.move_on_at(deadline):
                if await self._try():
                    deadline = trio.current_time() + RENEW_WITHIN
                elif self._seen is not None and self._seen.holder != self._identity:
                    break
        scope.cancel()

    async def _try(self) -> bool:
        """Take or renew; whether it is ours now."""
        try:
            lease = await self._client.find(LEASES.path(self._namespace, self._name))
            self._observe(lease)
            if not may_take(self._seen, self._identity, trio.current_time()):
                return False
            await self._write(lease, self._identity)
        except ApiError as exc:
            if exc.status != 409:
                _log.warning("failed", lease=self._name, because=str(exc))
            return False
        except ApiUnavailable:
            return False
        return True

    async def _release(self) -> None:
        """Give it back, so that another need not wait until it runs out."""
        try:
            lease = await self._client.find(LEASES.path(self._namespace, self._name))
            if lease is not None and mapping_at(lease, "spec").get("holderIdentity") == self._identity:
                await self._write(lease, "")
        except (ApiError, ApiUnavailable):
            pass  # it runs out by itself

    def _observe(self, lease: Mapping[str, object] | None) -> None:
        if lease is None:
            self._seen = None
            return
        spec = mapping_at(lease, "spec")
        duration = spec.get("leaseDurationSeconds")
        seen = Observation(
            holder=str(spec.get("holderIdentity") or ""),
            renewed=str(spec.get("renewTime")),
            duration=float(duration) if isinstance(duration, int) and duration > 0 else DURATION,
            since=trio.current_time(),
        )
        if self._seen is None or (seen.holder, seen.renewed) != (self._seen.holder, self._seen.renewed):
            self._seen = seen

    async def _write(self, lease: Mapping[str, object] | None, holder: str) -> None:
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        spec: dict[str, object] = {"holderIdentity": holder, "leaseDurationSeconds": DURATION if holder else 1, "renewTime": now}
        if lease is None:
            metadata = {"name": self._name, "namespace": self._namespace}
            body = {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": metadata}
            await self._client.create(
                LEASES.collection(self._namespace), {**body, "spec": {**spec, "acquireTime": now, "leaseTransitions": 0}}
            )
            return
        before = mapping_at(lease, "spec")
        if holder and before.get("holderIdentity") != holder:
            transitions = before.get("leaseTransitions")
            spec |= {"acquireTime": now, "leaseTransitions": (transitions if isinstance(transitions, int) else 0) + 1}
        await self._client.replace(LEASES.path(self._namespace, self._name), {**lease, "spec": {**before, **spec}})
