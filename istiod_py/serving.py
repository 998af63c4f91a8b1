"""Our own TLS certificate on the port for agents: signed by our authority, renewed at half life, used by new connections at once."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from istiod_py.ca import CaError, CertificateAuthority
from istiod_py.files import PUBLIC_MODE, SECRET_MODE, write_atomically
from mesh.rpc.tls import InvalidTlsMaterial, server_tls


class ServingTls:
    """The TLS context for new connections. The standard library's ssl takes keys from files only, hence those in the state directory."""

    def __init__(self, ca: CertificateAuthority, names: Sequence[str], state: Path, now: Callable[[], datetime]) -> None:
        self._ca = ca
        self._names = tuple(names)
        self._state = state
        self._now = now
        self._roots = b""
        self.renew()

    def context(self) -> ssl.SSLContext:
        """For each new connection."""
        return self._context

    @property
    def due(self) -> bool:
        """Half of the certificate's life is over, or the root is another than when it was made."""
        half = self._not_before + (self._not_after - self._not_before) / 2
        return self._now() >= half or self._roots != self._ca.roots_pem

    def renew(self) -> None:
        """Raises CaError; the old certificate then stays in use."""
        serving = self._ca.issue_serving(self._names, self._now())
        chain_file, key_file = self._state / "serving-chain.pem", self._state / "serving-key.pem"
        try:
            write_atomically(key_file, serving.key_pem, SECRET_MODE)
            write_atomically(chain_file, serving.chain_pem, PUBLIC_MODE)
            self._context = server_tls(chain_file, key_file)
        except (OSError, InvalidTlsMaterial) as exc:
            raise CaError(f"can't make the serving certificate: {exc}") from exc
        self._not_before, self._not_after = serving.not_before, serving.not_after
        self._roots = self._ca.roots_pem
