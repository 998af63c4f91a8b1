"""The certificates a mover holds, as ready TLS contexts: one per identity and renewal, never one per connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.reactor.loop import Reactor
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import hbone_context
from ztunnel_py.mover.waiting import WaitingRoom

FIRST_CERTIFICATE_SECONDS = 10.0
"""How long a connection waits for its identity's first certificate: a healthy control plane signs in well under a second."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate and the context made of it. Connections made with an older one live on with it."""

    bundle: CertificateBundle
    context: SSL.Context


class CredentialStore:
    """Certificates by identity. ``ask`` tells the brain that one is wanted; ``now`` is the wall clock."""

    def __init__(
        self, reactor: Reactor, ask: Callable[[SpiffeId], None], *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._ask = ask
        self._now = now
        self._held: dict[SpiffeId, Credentials] = {}
        self._unavailable: dict[SpiffeId, str] = {}
        self._waiting: WaitingRoom[SpiffeId] = WaitingRoom(reactor)

    def put(self, bundle: CertificateBundle) -> None:
        """Use this certificate for new connections from now on. Raises OpenSSL.SSL.Error when OpenSSL does not take it."""
        self._held[bundle.identity] = Credentials(bundle, hbone_context(bundle))
        self._unavailable.pop(bundle.identity, None)
        self._waiting.settle(bundle.identity)

    def refuse(self, identity: SpiffeId, because: str) -> None:
        """There is no new certificate for this identity; one that is held goes on being used until it expires."""
        self._unavailable[identity] = because
        self._waiting.settle(identity)

    def forget(self, identity: SpiffeId) -> None:
        """No pod has this identity any more: nothing of it is kept, least of all its key."""
        self._held.pop(identity, None)
        self._unavailable.pop(identity, None)

    def when_available(self, identity: SpiffeId, on_result: Callable[[Credentials | str], None]) -> None:
        """Call back with the identity's certificate, at once if a valid one is held, or with the reason why there is none."""
        held = self._find_valid(identity)
        if held is not None:
            on_result(held)
            return

        def settled() -> None:
            on_result(self._find_valid(identity) or self._explain(identity, "no certificate"))

        def expired() -> None:
            on_result(self._explain(identity, f"no certificate came within {FIRST_CERTIFICATE_SECONDS:g} s"))

        if self._waiting.wait(identity, FIRST_CERTIFICATE_SECONDS, settled, expired):
            self._ask(identity)

    def _find_valid(self, identity: SpiffeId) -> Credentials | None:
        """Peers would refuse an expired one in words that blame the wrong end."""
        held = self._held.get(identity)
        return held if held is not None and self._now() < held.bundle.not_after else None

    def _explain(self, identity: SpiffeId, otherwise: str) -> str:
        because = self._unavailable.get(identity, otherwise)
        held = self._held.get(identity)
        if held is None:
            return f"identity error: {because}"
        return f"identity error: the certificate expired at {held.bundle.not_after:%Y-%m-%dT%H:%M:%SZ}: {because}"

    def wanted(self) -> tuple[SpiffeId, ...]:
        """Identities that connections wait for, to ask a new brain again."""
        return self._waiting.waited_for()
