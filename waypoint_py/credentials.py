"""The waypoint's certificate as a ready TLS context: one per renewal, never one per connection."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from OpenSSL import SSL

from mesh.model.identity import SpiffeId
from mesh.tls.bundle import CertificateBundle
from mesh.tls.contexts import hbone_context


class Credentials:
    """Connections made with an older certificate live on with it. ``now`` is the wall clock."""

    def __init__(self, identity: SpiffeId, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.identity = identity
        self._now = now
        self._bundle: CertificateBundle | None = None
        self._context: SSL.Context | None = None
        self._because = "no certificate has come yet"

    @property
    def bundle(self) -> CertificateBundle | None:
        return self._bundle

    def put(self, bundle: CertificateBundle) -> None:
        """Use it for new connections from now on. Raises OpenSSL.SSL.Error when OpenSSL does not take it."""
        self._context = hbone_context(bundle)
        self._bundle = bundle

    def refuse(self, because: str) -> None:
        """There is no new one; the one that is held goes on being used until it expires."""
        self._because = because

    def context(self) -> SSL.Context | str:
        """For accepting and dialling; or why that cannot be done."""
        # Peers would refuse an expired one in words that blame the wrong end.
        context, bundle = self._context, self._bundle
        if context is None or bundle is None:
            return self._because
        if self._now() >= bundle.not_after:
            return f"the certificate expired at {bundle.not_after:%Y-%m-%dT%H:%M:%SZ}: {self._because}"
        return context
