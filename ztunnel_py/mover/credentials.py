"""The certificates a mover holds, as ready TLS contexts: one pair per identity and renewal, never one per connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.reactor.loop import Reactor
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import client_context, server_context
from ztunnel_py.mover.waiting import WaitingRoom

FIRST_CERTIFICATE_SECONDS = 10.0
"""How long a connection waits for its identity's first certificate: a healthy control plane signs in well under a second."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """A certificate and the contexts made of it. Connections made with an older one live on with it."""

    bundle: CertificateBundle
    server: SSL.Context
    client: SSL.Context


class CredentialStore:
    """Certificates by identity. ``ask`` tells the brain that one is wanted."""

    def __init__(self, reactor: Reactor, ask: Callable[[SpiffeId], None]) -> None:
        self._ask = ask
        self._held: dict[SpiffeId, Credentials] = {}
        self._unavailable: dict[SpiffeId, str] = {}
        self._waiting: WaitingRoom[SpiffeId] = WaitingRoom(reactor)

    def put(self, bundle: CertificateBundle) -> None:
        """Use this certificate for new connections from now on."""
        self._held[bundle.identity] = Credentials(bundle, server_context(bundle), client_context(bundle))
        self._unavailable.pop(bundle.identity, None)
        self._waiting.settle(bundle.identity)

    def refuse(self, identity: SpiffeId, because: str) -> None:
        """There is no certificate for this identity; one that is held already goes on being used."""
        self._unavailable[identity] = because
        self._waiting.settle(identity)

    def when_available(self, identity: SpiffeId, on_result: Callable[[Credentials | str], None]) -> None:
        """Call back with the identity's certificate, at once if held, or with the reason why there is none."""
        held = self._held.get(identity)
        if held is not None:
            on_result(held)
            return

        def settled() -> None:
            on_result(self._held.get(identity) or f"identity error: {self._unavailable.get(identity, 'no certificate')}")

        def expired() -> None:
            because = self._unavailable.get(identity, f"no certificate came within {FIRST_CERTIFICATE_SECONDS:g} s")
            on_result(f"identity error: {because}")

        if self._waiting.wait(identity, FIRST_CERTIFICATE_SECONDS, settled, expired):
            self._ask(identity)

    def wanted(self) -> tuple[SpiffeId, ...]:
        """Identities that connections wait for, to ask a new brain again."""
        return self._waiting.waited_for()
