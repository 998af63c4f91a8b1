"""Certificates that are there when a connection needs them: fetched once per identity, renewed at half life, kept when renewal fails.

How ztunnel does it, with two differences: a fetch has a deadline, and times are checked against the wall clock at least once a minute, so
that a machine that slept renews when it wakes.
"""

from __future__ import annotations

import base64
import heapq
import itertools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, IntEnum
from typing import Final, TypeAlias

import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.model.identity import SpiffeId
from mesh.telemetry.log import get_logger
from mesh.tls.bundle import CertificateBundle

CONCURRENT_FETCHES: Final = 8
FETCH_TIMEOUT: Final = 20.0
"""Seconds; an authority may itself wait some seconds for the pod to appear."""
FIRST_BACKOFF: Final = 1.0
LONGEST_BACKOFF: Final = 150.0
BACKOFF_SPREAD: Final = 0.2
RENEWAL_POINT: Final = 0.5
RENEWAL_SPREAD: Final = 0.05
"""Of the lifetime, to each side: pods that started together do not renew together."""
SOONEST_RENEWAL: Final = timedelta(seconds=1)
_CLOCK_CHECK: Final = 60.0

_log = get_logger("certificates")

NO_LONGER_NEEDED: Final = "the identity is no longer needed"


class Priority(IntEnum):
    """Which fetch goes first; within one priority the order of requests."""

    REQUESTED = 0
    """A connection waits."""
    WARMUP = 1
    BACKGROUND = 2
    """Renewal."""


class CertificateFetchFailed(Exception):
    """The injected fetch got no certificate; the text is the reason (``signing gRPC error (UNAVAILABLE): ...``)."""


class CertificateUnavailable(Exception):
    """There is no valid certificate for the identity now; the text is the reason that the access log prints."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Told to subscribers: no valid certificate, because the last fetch failed or the identity was forgotten."""

    identity: SpiffeId
    because: str


CertificateNews: TypeAlias = CertificateBundle | Unavailable
Subscriber: TypeAlias = Callable[[CertificateNews], None]
Fetch: TypeAlias = Callable[[SpiffeId], Awaitable[CertificateBundle]]


class Stage(Enum):
    """Values are ztunnel's words in config_dump."""

    INITIALIZING = "Initializing"
    AVAILABLE = "Available"
    UNAVAILABLE = "Unavailable"


@dataclass(frozen=True, slots=True)
class CertificateState:
    """One identity at one moment. ``because`` is the last failure, also while an older certificate still serves."""

    identity: SpiffeId
    stage: Stage
    bundle: CertificateBundle | None
    because: str | None
    renewal: datetime | None


class _Entry:
    """What is known of one identity. At most one of: queued, in flight, waiting for its time."""

    __slots__ = ("bundle", "changed", "due", "error", "failures", "flight", "identity", "queued", "retry_at")

    def __init__(self, identity: SpiffeId) -> None:
        self.identity = identity
        self.bundle: CertificateBundle | None = None
        self.error: str | None = None
        self.failures = 0
        self.queued: Priority | None = None
        self.flight: trio.CancelScope | None = None
        self.due: datetime | None = None
        """Wall time of the next renewal."""
        self.retry_at = 0.0
        """trio's time before which nothing is tried again."""
        self.changed = trio.Event()

    def notify(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class CertificateManager:
    """Holds the certificates of all identities asked for. `run` does the work; everything else is synchronous but `wait_bundle`.

    ``now`` is the wall clock, which certificates are measured by.
    """

    def __init__(
        self,
        fetch: Fetch,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        rng: random.Random | None = None,
        fetch_timeout: float = FETCH_TIMEOUT,
    ) -> None:
        self._fetch = fetch
        self._now = now
        self._rng = rng or random.Random()
        self._fetch_timeout = fetch_timeout
        self._entries: dict[SpiffeId, _Entry] = {}
        self._queue: list[tuple[Priority, int, SpiffeId]] = []
        self._order = itertools.count()
        self._flying = 0
        self._wake = trio.Event()
        self._subscribers: list[Subscriber] = []

    # Asking

    def request(self, identity: SpiffeId, priority: Priority = Priority.REQUESTED) -> None:
        """See to it that the identity's certificate is fetched and kept fresh; what waits already moves up if this is more urgent.

        After a failure only the back-off decides about the next try: an authority that is down is not asked once per connection.
        """
        entry = self._entries.get(identity)
        if entry is None:
            entry = self._entries[identity] = _Entry(identity)
            self._enqueue(entry, priority)
        elif entry.queued is not None:
            if priority < entry.queued:
                self._enqueue(entry, priority)
        elif entry.flight is None and self._stage(entry) is Stage.INITIALIZING:
            self._enqueue(entry, priority)  # expired while the machine slept

    def adopt(self, bundle: CertificateBundle) -> None:
        """A certificate that somebody else holds already, for an identity that was asked for: it need not be fetched now."""
        entry = self._entries.get(bundle.identity)
        if entry is not None and self._valid(entry) is None and bundle.not_after > self._now():
            entry.queued = None
            self._succeeded(entry, bundle)

    def find_bundle(self, identity: SpiffeId) -> CertificateBundle | None:
        """The identity's certificate if one is held and has not expired."""
        entry = self._entries.get(identity)
        return self._valid(entry) if entry is not None else None

    async def wait_bundle(self, identity: SpiffeId, priority: Priority = Priority.REQUESTED) -> CertificateBundle:
        """The identity's certificate, after its first fetch if need be. Raises CertificateUnavailable, at once while a retry is pending."""
        self.request(identity, priority)
        entry = self._entries[identity]
        while True:
            bundle = self._valid(entry)
            if bundle is not None:
                return bundle
            if self._entries.get(identity) is not entry:
                raise CertificateUnavailable(NO_LONGER_NEEDED)
            if entry.error is not None:
                raise CertificateUnavailable(entry.error)
            await entry.changed.wait()

    def forget(self, identity: SpiffeId) -> None:
        """The last workload with this identity is gone: drop its key, stop renewing, cancel a fetch in flight."""
        entry = self._entries.pop(identity, None)
        if entry is None:
            return
        entry.queued = None
        entry.bundle = None
        if entry.flight is not None:
            entry.flight.cancel()
        entry.notify()
        self._tell(Unavailable(identity, NO_LONGER_NEEDED))

    def retry_failed(self) -> None:
        """The authority can be reached again: end all back-offs now."""
        for entry in self._entries.values():
            if entry.failures:
                entry.retry_at = 0.0
        self._wake.set()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Call ``subscriber`` with every new bundle and every unavailability from now on; the result ends that."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def states(self) -> list[CertificateState]:
        """All identities, sorted."""
        entries = sorted(self._entries.values(), key=lambda entry: entry.identity)
        return [CertificateState(e.identity, self._stage(e), e.bundle, e.error, e.due) for e in entries]

    # Working

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch and renew until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._wake = trio.Event()
                pause = self._enqueue_due()
                while self._flying < CONCURRENT_FETCHES and (entry := self._pop()) is not None:
                    self._flying += 1
                    entry.flight = trio.CancelScope()
                    nursery.start_soon(self._fetch_one, entry, entry.flight)
                with trio.move_on_after(pause):
                    await self._wake.wait()

    def _enqueue(self, entry: _Entry, priority: Priority) -> None:
        # An older place in the queue stays there and is skipped when its turn comes: its priority is no longer the entry's.
        entry.queued = priority
        heapq.heappush(self._queue, (priority, next(self._order), entry.identity))
        self._wake.set()

    def _pop(self) -> _Entry | None:
        while self._queue:
            priority, _, identity = heapq.heappop(self._queue)
            entry = self._entries.get(identity)
            if entry is not None and entry.queued is priority:
                entry.queued = None
                return entry
        return None

    def _enqueue_due(self) -> float:
        """Queue every renewal and retry whose time has come; return the seconds until the next, at most the interval of clock checks."""
        now, trio_now, pause = self._now(), trio.current_time(), _CLOCK_CHECK
        for entry in self._entries.values():
            if entry.due is None or entry.queued is not None or entry.flight is not None:
                continue
            left = max((entry.due - now).total_seconds(), entry.retry_at - trio_now)
            if left <= 0:
                self._enqueue(entry, Priority.BACKGROUND)
            else:
                pause = min(pause, left)
        return pause

    async def _fetch_one(self, entry: _Entry, flight: trio.CancelScope) -> None:
        try:
            with flight:
                await self._fetch_into(entry)
        finally:
            entry.flight = None
            self._flying -= 1
            self._wake.set()

    async def _fetch_into(self, entry: _Entry) -> None:
        try:
            with trio.fail_after(self._fetch_timeout):
                bundle = await self._fetch(entry.identity)
            self._check(entry.identity, bundle)
        except CertificateFetchFailed as exc:
            self._failed(entry, str(exc))
        except trio.TooSlowError:
            self._failed(entry, f"no answer from the certificate authority within {self._fetch_timeout:g} s")
        except Exception as exc:  # supervises the injected fetch: its defect costs this identity a retry, not all identities their renewal
            _log.exception("fetch.crashed", identity=str(entry.identity))
            self._failed(entry, f"{type(exc).__name__}: {exc}")
        else:
            if self._entries.get(entry.identity) is entry:
                self._succeeded(entry, bundle)

    def _check(self, identity: SpiffeId, bundle: CertificateBundle) -> None:
        if bundle.identity != identity:
            raise CertificateFetchFailed(f"did not find expected SAN: {identity}")
        if bundle.not_after <= self._now():
            raise CertificateFetchFailed(
                f"the certificate had expired when it came, at {bundle.not_after:%Y-%m-%dT%H:%M:%SZ}: check the clocks"
            )

    def _succeeded(self, entry: _Entry, bundle: CertificateBundle) -> None:
        lifetime = bundle.not_after - bundle.not_before
        point = RENEWAL_POINT + self._rng.uniform(-RENEWAL_SPREAD, RENEWAL_SPREAD)
        entry.bundle, entry.error, entry.failures, entry.retry_at = bundle, None, 0, 0.0
        entry.due = max(bundle.not_before + lifetime * point, self._now() + SOONEST_RENEWAL)
        _log.info("fetched", identity=str(entry.identity), expires=bundle.not_after.isoformat(), renewal=entry.due.isoformat())
        entry.notify()
        self._tell(bundle)

    def _failed(self, entry: _Entry, reason: str) -> None:
        if self._entries.get(entry.identity) is not entry:
            return  # forgotten meanwhile
        # ** of a bounded exponent: failures go on for as long as the authority is away.
        pause = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** min(entry.failures, 10)) * self._rng.uniform(
            1 - BACKOFF_SPREAD, 1 + BACKOFF_SPREAD
        )
        entry.failures += 1
        entry.error = reason
        entry.due = self._now()
        held = self._valid(entry)
        if held is not None:
            pause = min(pause, max((held.not_after - self._now()).total_seconds(), FIRST_BACKOFF))
        entry.retry_at = trio.current_time() + min(pause, LONGEST_BACKOFF)
        _log.warning("fetch.failed", identity=str(entry.identity), error=reason, retry_in=f"{pause:.1f}s", holds_valid=held is not None)
        entry.notify()
        if held is None:
            self._tell(Unavailable(entry.identity, reason))

    def _tell(self, news: CertificateNews) -> None:
        for subscriber in tuple(self._subscribers):
            subscriber(news)

    def _valid(self, entry: _Entry) -> CertificateBundle | None:
        return entry.bundle if entry.bundle is not None and self._now() < entry.bundle.not_after else None

    def _stage(self, entry: _Entry) -> Stage:
        if self._valid(entry) is not None:
            return Stage.AVAILABLE
        return Stage.INITIALIZING if entry.error is None else Stage.UNAVAILABLE


def describe_certificates(states: list[CertificateState]) -> list[dict[str, object]]:
    """``certificates`` of config_dump in ztunnel's form, which ``istioctl ztunnel-config certificates`` reads. No key is in it."""
    return [
        {
            "identity": str(state.identity),
            "state": f"Unavailable: {state.because}" if state.stage is Stage.UNAVAILABLE else state.stage.value,
            "certChain": _describe_chain(b"".join(state.bundle.chain_pem)) if state.bundle is not None else [],
            "rootCerts": _describe_chain(state.bundle.roots_pem) if state.bundle is not None else [],
        }
        for state in states
    ]


def _describe_chain(pem: bytes) -> list[dict[str, str]]:
    return [_describe_certificate(certificate) for certificate in x509.load_pem_x509_certificates(pem)]


def _describe_certificate(certificate: x509.Certificate) -> dict[str, str]:
    return {
        "pem": base64.b64encode(certificate.public_bytes(Encoding.PEM)).decode(),
        "serialNumber": str(certificate.serial_number),
        "validFrom": f"{certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
        "expirationTime": f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
    }
