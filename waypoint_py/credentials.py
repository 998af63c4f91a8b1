"""The waypoint's certificate as ready TLS contexts: one pair per renewal, never one per connection."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import client_context, server_context


class Credentials:
    """Connections made with an older certificate live on with it. ``now`` is the wall clock."""

    def __init__(self, identity: SpiffeId, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.identity = identity
        self._now = now
        self._bundle: CertificateBundle | None = None
        self._server: SSL.Context | None = None
        self._client: SSL.Context | None = None
        self._because = "no certificate has come yet"

    @property
    def bundle(self) -> CertificateBundle | None:
        return self._bundle

    def put(self, bundle: CertificateBundle) -> None:
        """Use it for new connections from now on. Raises OpenSSL.SSL.Error when OpenSSL does not take it."""
        server, client = server_context(bundle), client_context(bundle)
        self._bundle, self._server, self._client = bundle, server, client

    def refuse(self, because: str) -> None:
        """There is no new one; the one that is held goes on being used until it expires."""
        self._because = because

    def context(self) -> SSL.Context | str:
        """For dialling; or why that cannot be done."""
        return self._context_or_reason(self._client)

    def server_context(self) -> SSL.Context | str:
        """For accepting; or why that cannot be done."""
        return self._context_or_reason(self._server)

    def _context_or_reason(self, context: SSL.Context | None) -> SSL.Context | str:
        """Peers would refuse an expired one in words that blame the wrong end."""
        bundle = self._bundle
        if context is None or bundle is None:
            return self._because
        if self._now() >= bundle.not_after:
            return f"the certificate expired at {bundle.not_after:%Y-%m-%dT%H:%M:%SZ}: {self._because}"
        return context
