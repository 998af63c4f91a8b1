"""The workload identity that certificates carry and policies name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

DEFAULT_TRUST_DOMAIN = "cluster.local"


class InvalidSpiffeId(ValueError):
    """The text is not ``spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`` with no part empty."""


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """A workload identity (SPIFFE ID in Istio's form). Holding one means it parsed; nothing downstream re-checks it."""

    trust_domain: str
    namespace: str
    service_account: str

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Parse a URI SAN. Stricter than ztunnel, which admits empty segments. Raises InvalidSpiffeId."""
        match uri.split("/"):
            case ["spiffe:", "", td, "ns", ns, "sa", sa] if td and ns and sa:
                return cls(td, ns, sa)
        raise InvalidSpiffeId(f"invalid spiffe identity: {uri!r}")

    @property
    def principal(self) -> str:
        """The form AuthorizationPolicy uses: the URI without ``spiffe://``."""
        return f"{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}/ns/{self.namespace}/sa/{self.service_account}"
