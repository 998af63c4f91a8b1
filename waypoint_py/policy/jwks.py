"""Key sets that a waypoint fetches itself: kept while they serve, renewed before they are missed, never waited for twice.

A request waits only for the first answer. Afterwards a set is renewed beside the traffic, and one that cannot be renewed goes on to be
used: keys that verified a minute ago are better than none.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import trio

from mesh.http.message import Request
from mesh.model.l7.policy import JwtRule
from mesh.runtime.outbound import Dial, OutboundError
from mesh.runtime.outbound import fetch as fetch_url
from mesh.telemetry.log import get_logger
from waypoint_py.policy.facts import TokenFacts
from waypoint_py.policy.keys import MAX_KEY_SET, InvalidKeySet, KeySet
from waypoint_py.policy.tokens import KeysFailed, Passed, Refused, TokenChecker, Wanted
from waypoint_py.verdict import LocalReply, Park, Verdict

REFRESH: Final = 300.0
"""Seconds after which a set is renewed (Envoy's default), less up to `JITTER` of it: waypoints do not ask all at once."""
JITTER: Final = 0.2
UNKNOWN_KID: Final = 30.0
"""At most once in so many seconds a token with an unknown ``kid`` makes us look for new keys: anybody can write one."""
RETRY: Final = (1.0, 60.0)
"""Seconds until a failed fetch is tried again, doubled each time up to the second."""
MAX_SETS: Final = 256
AT_ONCE: Final = 8
"""Fetches at the same time."""

Fetch: TypeAlias = Callable[[str, float], Awaitable[bytes]]
"""The body behind a URL, within so many seconds. Raises OutboundError."""

_log = get_logger("jwks")


def fetch_through(dial: Dial | None = None) -> Fetch:
    """Fetching as it is meant: see `mesh.runtime.outbound`. ``dial`` replaces connecting."""

    async def fetch(url: str, within: float) -> bytes:
        return await fetch_url(url, limit=MAX_KEY_SET, within=within, dial=dial)

    return fetch


@dataclass(slots=True, eq=False)
class _Entry:
    """One URL. Times are the store's clock; ``due``: when it is fetched again, whether it succeeded or not."""

    uri: str
    within: float
    keys: KeySet | None = None
    text: bytes = b""
    failed: KeysFailed | None = None
    failures: int = 0
    due: float = 0.0
    suspected: float = float("-inf")
    used: float = 0.0
    flight: trio.Event | None = None
    """Set when the fetch that is under way has ended."""


class KeyStore:
    """`find` and `suspect` may be called from the reactor, between trio's steps; `run` must be running for anything to be fetched."""

    def __init__(
        self, fetch: Fetch | None = None, *, clock: Callable[[], float] = time.monotonic, rng: Callable[[], float] = random.random
    ) -> None:
        self._fetch = fetch or fetch_through()
        self._clock = clock
        self._rng = rng
        self._entries: dict[str, _Entry] = {}
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._slots = trio.CapacityLimiter(AT_ONCE)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def find(self, rule: JwtRule) -> KeySet | KeysFailed | None:
        """What `TokenChecker` asks: the keys as they are, a failure that is still fresh, or None: `wait_fetched` first."""
        entry = self._entries.get(rule.jwks_uri)
        if entry is None:
            return None
        now = self._clock()
        entry.used = now
        if entry.keys is None:
            return entry.failed if now < entry.due else None
        if now >= entry.due and entry.flight is None:
            self._fetch_soon(entry)
        return entry.keys

    def suspect(self, rule: JwtRule) -> None:
        """A token named a key that the set does not have: it may be a new one."""
        entry = self._entries.get(rule.jwks_uri)
        now = self._clock()
        if entry is not None and entry.flight is None and now - entry.suspected >= UNKNOWN_KID:
            entry.suspected = now
            self._fetch_soon(entry)

    async def wait_fetched(self, rule: JwtRule) -> None:
        """Until the first fetch of the rule's set has ended, one way or the other: `find` has an answer then."""
        entry = self._entries.get(rule.jwks_uri) or self._add(rule)
        if entry is not None and entry.keys is None and self._clock() >= entry.due:
            self._start(entry)
        if entry is not None and entry.flight is not None:
            await entry.flight.wait()
        else:
            await trio.lowlevel.checkpoint()

    def _add(self, rule: JwtRule) -> _Entry | None:
        """A place for a set, that of the one longest unused if need be; None if all are being fetched."""
        if len(self._entries) >= MAX_SETS:
            idle = [entry for entry in self._entries.values() if entry.flight is None]
            if not idle:
                return None
            del self._entries[min(idle, key=lambda entry: entry.used).uri]
        entry = self._entries[rule.jwks_uri] = _Entry(rule.jwks_uri, rule.timeout, used=self._clock())
        return entry

    def _fetch_soon(self, entry: _Entry) -> None:
        if self._token is not None:
            self._token.run_sync_soon(self._start, entry, idempotent=True)

    def _start(self, entry: _Entry) -> None:
        if entry.flight is None and self._nursery is not None:
            entry.flight = trio.Event()
            self._nursery.start_soon(self._renew, entry)

    async def _renew(self, entry: _Entry) -> None:
        try:
            async with self._slots:
                text = await self._fetch(entry.uri, entry.within)
            keys = entry.keys if text == entry.text and entry.keys is not None else KeySet.parse(text)
        except (OutboundError, InvalidKeySet) as exc:
            self._note_failure(entry, str(exc))
        else:
            self._note_keys(entry, keys, text)
        finally:
            flight, entry.flight = entry.flight, None
            if flight is not None:
                flight.set()

    def _note_keys(self, entry: _Entry, keys: KeySet, text: bytes) -> None:
        if keys is not entry.keys:
            _log.info("keys.fetched", uri=entry.uri, keys=len(keys.keys), skipped=list(keys.skipped[:5]))
        entry.keys, entry.text, entry.failed, entry.failures = keys, text, None, 0
        entry.due = self._clock() + REFRESH * (1 - JITTER * self._rng())

    def _note_failure(self, entry: _Entry, reason: str) -> None:
        first, longest = RETRY
        pause = min(longest, first * 2**entry.failures)
        entry.failures = min(entry.failures + 1, 16)
        entry.failed = KeysFailed(reason)
        entry.due = self._clock() + pause * (1 + JITTER * self._rng())
        _log.warning("keys.failed", uri=entry.uri, reason=reason, kept=entry.keys is not None, retry_in=round(pause, 1))


class Authenticator:
    """The filter of RequestAuthentication: `TokenChecker`, and waiting for keys where it must."""

    def __init__(self, store: KeyStore, *, now: Callable[[], float] = time.time) -> None:
        """``now``: seconds since 1970."""
        self._store = store
        self._now = now

    def check(self, checker: TokenChecker, request: Request, accept: Callable[[TokenFacts | None], None]) -> Verdict:
        """A request that passes is changed as the rules say, and ``accept`` gets what its token proved, before this returns None, or
        before the Park does."""
        if checker.idle:
            return None
        outcome = checker.check(request, self._now())
        if isinstance(outcome, Wanted):
            rule = outcome.rule

            async def run() -> LocalReply | None:
                return await self._wait_and_check(checker, request, accept, rule)

            return Park(run, f"keys of {rule.issuer} from {rule.jwks_uri}")
        return self._settle(outcome, request, accept)

    async def _wait_and_check(
        self, checker: TokenChecker, request: Request, accept: Callable[[TokenFacts | None], None], rule: JwtRule
    ) -> LocalReply | None:
        for _ in range(_MAX_WAITS):
            await self._store.wait_fetched(rule)
            outcome = checker.check(request, self._now())
            if not isinstance(outcome, Wanted):
                return self._settle(outcome, request, accept)
            rule = outcome.rule
        return checker.refuse_unfetched(request, rule)

    def _settle(self, outcome: Passed | Refused, request: Request, accept: Callable[[TokenFacts | None], None]) -> LocalReply | None:
        if isinstance(outcome, Refused):
            for rule in outcome.unknown_keys:
                self._store.suspect(rule)
            return outcome.reply
        outcome.changes.apply(request)
        accept(outcome.facts)
        return None


_MAX_WAITS: Final = 8
"""Sets that one request waits for, one after the other."""
