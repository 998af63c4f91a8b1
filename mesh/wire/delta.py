"""Delta xDS of one stream, without I/O and without protobuf: subscriptions, nonces, ACK and NACK, versions across reconnects.

`DeltaClient` outlives its streams (it remembers what is held); `DeltaServer` is one stream's. Facts: xDS protocol, "incremental xDS";
istiod's classification of requests is that of Istio's delta server, the node proxy's habits are those of ztunnel's delta client.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from mesh.wire.errors import ErrorCode, LocalProtocolError, RemoteProtocolError

WILDCARD: Final = "*"
MAX_NAMES: Final = 500_000
"""Names one client may subscribe to by name in one type."""
MAX_NAME: Final = 1024
MAX_TYPES: Final = 64


@dataclass(frozen=True, slots=True)
class Request:
    """A DeltaDiscoveryRequest without its node. ``error`` None: no refusal; ``nonce`` empty: of the client's own accord."""

    type_url: str
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    initial_versions: Mapping[str, str] = field(default_factory=dict)
    nonce: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Interest:
    """A type to ask for: all of it, or on demand only what is named with `DeltaClient.subscribe`."""

    type_url: str
    on_demand: bool = False


class _Held:
    """What a client has of one type."""

    def __init__(self, interest: Interest) -> None:
        self.interest = interest
        self.versions: dict[str, str] = {}
        self.wanted: set[str] = set()
        self.answered = False
        """By any response, on any stream: the set is complete, if perhaps old."""

    def opening(self) -> Request:
        versions = dict.fromkeys(self.wanted, "") | self.versions
        if self.interest.on_demand:
            return Request(self.interest.type_url, (WILDCARD,), (WILDCARD,), versions)
        return Request(self.interest.type_url, initial_versions=versions)


class DeltaClient:
    """The client's side, across streams: `start` on every new one, `receive` for every response, `stop` when it is lost."""

    def __init__(self, interests: Sequence[Interest]) -> None:
        self._types = {interest.type_url: _Held(interest) for interest in interests}
        self._started = False

    def start(self) -> list[Request]:
        """The first request of every type, in order, with the versions of all that is held."""
        self._started = True
        return [held.opening() for held in self._types.values()]

    def stop(self) -> None:
        """The stream is lost; what is held stays."""
        self._started = False

    def forget(self, type_url: str) -> None:
        """What came of a type is lost: the next stream asks for all of it."""
        self._of(type_url).versions.clear()

    @property
    def synced(self) -> bool:
        """Every type that is not on demand has been answered once."""
        return not self.waiting_for

    @property
    def waiting_for(self) -> tuple[str, ...]:
        return tuple(url for url, held in self._types.items() if not (held.answered or held.interest.on_demand))

    def versions(self, type_url: str) -> Mapping[str, str]:
        """Name to version of all that is held of a type."""
        return self._of(type_url).versions

    def is_whole(self, type_url: str) -> bool:
        """Whether the next response completes the whole set, with the parts that came before, or is one more part of it: nothing but these
        was ever claimed as held."""
        held = self._types.get(type_url)
        return held is not None and not held.answered and not held.interest.on_demand

    def subscribe(self, type_url: str, names: Iterable[str]) -> Request | None:
        """Want more names of an on-demand type. None when all are wanted already, or when there is no stream: then `start` tells them."""
        held = self._of(type_url)
        new = tuple(name for name in dict.fromkeys(names) if name not in held.wanted)
        held.wanted.update(new)
        return Request(type_url, subscribe=new) if new and self._started else None

    def unsubscribe(self, type_url: str, names: Iterable[str]) -> Request | None:
        """Want names no more, and forget what is held of them."""
        held = self._of(type_url)
        gone = tuple(name for name in dict.fromkeys(names) if name in held.wanted)
        held.wanted.difference_update(gone)
        for name in gone:
            held.versions.pop(name, None)
        return Request(type_url, unsubscribe=gone) if gone and self._started else None

    def receive(
        self,
        type_url: str,
        nonce: str,
        *,
        accepted: Mapping[str, str],
        removed: Iterable[str] = (),
        errors: Sequence[str] = (),
        more: bool = False,
    ) -> Request:
        """A response was taken: ``accepted`` is held now (name to version), ``removed`` no more. Gives the ACK, or with ``errors``
        (one text for each refused resource) the NACK. A refused resource leaves what was held of that name: its old version is what a
        reconnect claims. A type nobody asked for is acknowledged and forgotten, as the node proxy does. ``more``: it was a part, and
        another follows."""
        if (held := self._types.get(type_url)) is not None:
            for name in removed:
                held.versions.pop(name, None)
            held.versions.update(accepted)
            held.answered = held.answered or not more
        return Request(type_url, nonce=nonce, error="; ".join(errors) if errors else None)

    def _of(self, type_url: str) -> _Held:
        try:
            return self._types[type_url]
        except KeyError:
            raise LocalProtocolError(f"no interest in {type_url}") from None


class Kind(Enum):
    """What a request was."""

    FIRST = "first"
    ACK = "ack"
    NACK = "nack"
    STALE = "stale"
    CHANGE = "change"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that is due. ``names`` None: all of the type; else what these names find. ``known`` is what the client holds: same
    versions are left out, what is gone is named as removed. An answer without resources is sent too."""

    type_url: str
    names: tuple[str, ...] | None
    known: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    kind: Kind
    answer: Answer | None = None
    error: str = ""
    """The client's reason, of a NACK."""


@dataclass(slots=True)
class Watch:
    """One type on one stream."""

    wildcard: bool
    names: set[str]
    nonce_sent: str = ""
    nonce_acked: str = ""
    error: str = ""
    """The last NACK's reason; empty again after an ACK of another response."""
    refused: str = ""
    """The response that the NACK was of."""


class DeltaServer:
    """One stream's server side: classifies requests, remembers subscriptions and nonces. Never holds the names of a wildcard watch."""

    def __init__(self) -> None:
        self.watches: dict[str, Watch] = {}

    def receive(self, request: Request) -> Outcome:
        """Classify a request and keep its books. Raises RemoteProtocolError for one beyond all bounds."""
        _check_bounds(request.subscribe)
        _check_bounds(request.unsubscribe)
        watch = self.watches.get(request.type_url)
        if watch is None:
            return Outcome(Kind.FIRST, self._open(request))
        answer = self._change(watch, request)
        if request.error is not None:
            watch.error, watch.refused = request.error, response_of(request.nonce)
            return Outcome(Kind.NACK, answer, request.error)
        if request.nonce:
            if request.nonce != watch.nonce_sent:
                return Outcome(Kind.STALE, answer)
            watch.nonce_acked = request.nonce
            if watch.refused != response_of(request.nonce):
                watch.error = watch.refused = ""
            return Outcome(Kind.ACK, answer)
        return Outcome(Kind.CHANGE if request.subscribe or request.unsubscribe else Kind.NOTHING, answer)

    def sent(self, type_url: str, nonce: str) -> None:
        """A response with this nonce went out."""
        self.watches[type_url].nonce_sent = nonce

    def _open(self, request: Request) -> Answer:
        if len(self.watches) >= MAX_TYPES:
            raise RemoteProtocolError("too many resource types", ErrorCode.ENHANCE_YOUR_CALM)
        _check_bounds(request.initial_versions)
        subscribed = set(request.subscribe) - {WILDCARD}
        wildcard = (not request.subscribe or WILDCARD in request.subscribe) and WILDCARD not in request.unsubscribe
        names = (subscribed | (set() if wildcard else set(request.initial_versions))) - set(request.unsubscribe)
        self.watches[request.type_url] = Watch(wildcard, names)
        return Answer(request.type_url, None if wildcard else tuple(sorted(names)), request.initial_versions)

    def _change(self, watch: Watch, request: Request) -> Answer | None:
        """Subscriptions count in every request, also with a stale nonce: the client believes them made (istiod drops those)."""
        watch.names.difference_update(request.unsubscribe)
        watch.names.update(name for name in request.subscribe if name != WILDCARD)
        if len(watch.names) > MAX_NAMES:
            raise RemoteProtocolError("too many names subscribed", ErrorCode.ENHANCE_YOUR_CALM)
        became_wildcard = WILDCARD in request.subscribe and not watch.wildcard
        watch.wildcard = (watch.wildcard or WILDCARD in request.subscribe) and WILDCARD not in request.unsubscribe
        if became_wildcard and watch.wildcard:
            return Answer(request.type_url, None)
        # Every name asked for is answered, even one that was subscribed before: the client may have dropped it meanwhile.
        named = tuple(name for name in dict.fromkeys(request.subscribe) if name != WILDCARD)
        return Answer(request.type_url, named) if named else None


def nonce_of(response: str, part: int) -> str:
    """Of a response's part, from 0. ``response`` has no dot in it."""
    return f"{response}.{part}"


def response_of(nonce: str) -> str:
    """The response that a nonce is of, whichever part."""
    return nonce.partition(".")[0]


def _check_bounds(names: Collection[str]) -> None:
    if len(names) > MAX_NAMES or any(len(name) > MAX_NAME for name in names):
        raise RemoteProtocolError("too many or too long resource names", ErrorCode.ENHANCE_YOUR_CALM)
