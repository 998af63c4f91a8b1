"""Key sets of identity providers, fetched by the control plane and handed to waypoints inside their RequestAuthentications.

Whoever may write such an object names the URL, and so it is fetched as a stranger's: `mesh.runtime.outbound` goes to no address of this
machine or its cloud. A set that was had stays in use when it can't be renewed, also over a restart (`istiod_py.keyarchive`), and goes when
nobody has wanted it for a week.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias

import trio

from istiod_py.keyarchive import KEPT, KeptSet, KeptSets
from istiod_py.translate.l7.authentication import KeySource
from mesh.kube.requestauthentication import find_key_set_mistake, find_url_mistake
from mesh.runtime.outbound import OutboundError, fetch
from mesh.telemetry.log import get_logger

REFRESH: Final = 20 * 60.0
"""Seconds after which a set is fetched again. This and the next are Istio's."""
RETRY: Final = (60.0, 3600.0)
"""Seconds until a failed fetch is tried again, doubled each time up to the second."""
FIRST_RETRY: Final = 1.0
"""The same where there is no set yet: tokens are refused meanwhile, and its server may have come with the policy and be starting."""
SPREAD: Final = 0.1
"""Share of a pause by which it is drawn shorter: replicas, and sources that came together, do not all ask at once."""
MAX_SET: Final = 1 << 20
"""Bytes of a key set or a discovery document."""
MAX_SOURCES: Final = 1000
AT_ONCE: Final = 8
_DISCOVERY: Final = "/.well-known/openid-configuration"

Fetch: TypeAlias = Callable[[str, float, int], Awaitable[bytes]]
"""The body behind a URL, within so many seconds and at most so many bytes. Raises FetchFailed."""

_log = get_logger("jwks")


class FetchFailed(Exception):
    """There is no key set to be had at the moment; the text says why."""


async def fetch_from_outside(url: str, within: float, limit: int) -> bytes:
    """A `Fetch` that goes where it may. Raises FetchFailed."""
    try:
        return await fetch(url, limit=limit, within=within)
    except OutboundError as exc:
        raise FetchFailed(f"{url}: {exc}") from exc


@dataclass(slots=True)
class _Entry:
    """What is known of one source. Times are trio's clock, but for ``fetched``, of ``keys``: that is the wall's, to outlive the process."""

    within: float
    due: float
    wanted: float
    """When it was wanted last."""
    keys: str | None = None
    fetched: float = 0.0
    failures: int = 0
    problem: str = ""
    fetching: bool = False


class KeySetKeeper:
    """Told what is wanted, and has what there is."""

    def __init__(
        self,
        fetch: Fetch = fetch_from_outside,
        *,
        refresh: float = REFRESH,
        rng: random.Random | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """``wall``: Unix time."""
        self._fetch = fetch
        self._wall = wall
        self._refresh = refresh
        self._rng = rng or random.Random()
        self._entries: dict[KeySource, _Entry] = {}
        self._wanted: Mapping[KeySource, float] = {}
        self._asked = trio.Event()
        self._changed = trio.Event()
        self._slots = trio.CapacityLimiter(AT_ONCE)

    @property
    def key_sets(self) -> dict[KeySource, str]:
        """Those there are, as JSON; also of sources that are not wanted any more."""
        return {source: entry.keys for source, entry in self._entries.items() if entry.keys is not None}

    @property
    def kept(self) -> dict[KeySource, KeptSet]:
        """The same, with when each was fetched."""
        return {source: KeptSet(entry.keys, entry.fetched) for source, entry in self._entries.items() if entry.keys is not None}

    @property
    def problems(self) -> dict[KeySource, str]:
        """Why a set that is wanted could not be fetched the last time, and what is used instead."""
        found = ((source, self._entries.get(source)) for source in self._wanted)
        return {source: _describe(source, entry) for source, entry in found if entry is not None and entry.problem}

    def recall(self, sets: KeptSets) -> None:
        """Start with what an earlier process had: used until there is something newer, and renewed as soon as it is wanted."""
        now = trio.current_time()
        for source, kept in sets.items():
            self._entries.setdefault(source, _Entry(0.0, now, now, kept.keys, kept.fetched))

    def want(self, sources: Mapping[KeySource, float]) -> None:
        """These are all that are wanted now, each with the seconds that fetching may take. New ones are fetched at once."""
        now = trio.current_time()
        for source in self._wanted.keys() - sources.keys():
            if source in self._entries:
                self._entries[source].wanted = now
        self._wanted = dict(sorted(sources.items())[:MAX_SOURCES])
        if len(self._wanted) < len(sources):
            _log.warning("key_sets.too_many", wanted=len(sources), most=MAX_SOURCES)
        for source, within in self._wanted.items():
            entry = self._entries.setdefault(source, _Entry(within, now, now))
            entry.within, entry.wanted = within, now
        self._asked.set()

    async def wait_changed(self) -> None:
        """Until `key_sets` or `problems` are others than when this was called."""
        await self._changed.wait()

    async def wait_tried(self) -> None:
        """Until every set that is wanted was fetched, or could not be. Needs `run`."""
        while any(entry.keys is None and not entry.problem for entry in map(self._entries.__getitem__, self._wanted)):
            await self._changed.wait()

    async def run(self) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            while True:
                self._asked = trio.Event()
                self._evict()
                for source, entry in self._due():
                    entry.fetching = True
                    nursery.start_soon(self._renew, source, entry)
                with trio.move_on_at(self._next()):
                    await self._asked.wait()

    def _due(self) -> list[tuple[KeySource, _Entry]]:
        now = trio.current_time()
        entries = ((source, self._entries[source]) for source in self._wanted)
        return [(source, entry) for source, entry in entries if not entry.fetching and entry.due <= now]

    def _next(self) -> float:
        """When there is something to do again: a fetch, or a set to forget."""
        fetches = [self._entries[source].due for source in self._wanted if not self._entries[source].fetching]
        ends = [entry.wanted + KEPT for source, entry in self._entries.items() if source not in self._wanted]
        return min([*fetches, *ends], default=float("inf"))

    def _evict(self) -> None:
        now = trio.current_time()
        over = [source for source, entry in self._entries.items() if source not in self._wanted and now >= entry.wanted + KEPT]
        for source in over:
            del self._entries[source]

    async def _renew(self, source: KeySource, entry: _Entry) -> None:
        try:
            async with self._slots:
                keys = await self._load(source, entry.within)
        except FetchFailed as exc:
            self._note_failure(source, entry, str(exc))
        else:
            self._note_keys(source, entry, keys)
        finally:
            entry.fetching = False
            self._asked.set()

    async def _load(self, source: KeySource, within: float) -> str:
        """Raises FetchFailed. Both steps of a discovery together may take as long as one fetch."""
        with trio.move_on_after(within):
            uri = source.uri or await self._discover(source.issuer, within)
            text = _decode(uri, await self._fetch(uri, within, MAX_SET))
            mistake = find_key_set_mistake(text)
            if mistake is not None:
                raise FetchFailed(f"{uri}: {mistake}")
            return text
        raise FetchFailed(f"no whole answer within {within:g} s")

    async def _discover(self, issuer: str, within: float) -> str:
        """OpenID Connect Discovery 1.0, 4: where the issuer's keys are. The document must be the issuer's own."""
        url = f"{issuer.rstrip('/')}{_DISCOVERY}"
        mistake = find_url_mistake(url)
        if mistake is not None:
            raise FetchFailed(f"issuer {issuer!r} names no server, and the rule no jwksUri")
        try:
            document = json.loads(_decode(url, await self._fetch(url, within, MAX_SET)))
        except (ValueError, RecursionError) as exc:
            raise FetchFailed(f"{url}: no JSON: {exc}") from exc
        uri = document.get("jwks_uri") if isinstance(document, dict) else None
        if not isinstance(uri, str) or find_url_mistake(uri) is not None:
            raise FetchFailed(f"{url}: no jwks_uri in it that is a URL")
        if document.get("issuer") != issuer:
            raise FetchFailed(f"{url}: is the document of another issuer")
        return uri

    def _note_keys(self, source: KeySource, entry: _Entry, keys: str) -> None:
        news = keys != entry.keys or bool(entry.problem)
        entry.keys, entry.fetched, entry.problem, entry.failures = keys, self._wall(), "", 0
        entry.due = trio.current_time() + self._spread(self._refresh)
        if news:
            _log.info("key_set.fetched", source=source.uri or source.issuer)
            self._tell()

    def _note_failure(self, source: KeySource, entry: _Entry, because: str) -> None:
        first, longest = RETRY
        first = FIRST_RETRY if entry.keys is None else min(first, self._refresh)
        pause = self._spread(min(longest, first * 2**entry.failures))
        entry.failures = min(entry.failures + 1, 16)
        entry.due = trio.current_time() + pause
        _log.warning("key_set.failed", source=source.uri or source.issuer, because=because, kept=entry.keys is not None)
        if because != entry.problem:
            entry.problem = because
            self._tell()

    def _spread(self, pause: float) -> float:
        return pause * (1 - SPREAD * self._rng.random())

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


def _describe(source: KeySource, entry: _Entry) -> str:
    """In words that follow the source's name."""
    problem = entry.problem.removeprefix(f"{source.uri}: ")
    if entry.keys is None:
        return f"{problem}; until there are keys, its tokens are refused"
    return f"{problem}; the keys that were fetched at {datetime.fromtimestamp(entry.fetched, UTC):%Y-%m-%dT%H:%M:%SZ} stay in use"


def _decode(uri: str, body: bytes) -> str:
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise FetchFailed(f"{uri}: no UTF-8: {exc}") from exc
