"""From one signing authority to the next without a failed handshake. Pure.

An agent trusts the roots that came with its certificate, for as long as that lasts. So a signer under a new root has to wait until the
last certificate that came without that root has ended, while the new root is handed out already; and an old root is handed out until
the last certificate signed under it has ended. Roots are told apart by name and key: one that is issued anew is still the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, NamedTuple, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

DEFAULT_TTL: Final = timedelta(hours=24)
"""How long a certificate lasts whose requester did not say."""

SigningKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Material:
    """What signs: a key, its certificate, the certificates between it and a root, and the roots that peers are to trust."""

    key: SigningKey = field(repr=False)
    certificate: x509.Certificate
    intermediates: tuple[x509.Certificate, ...]
    """From the signer's own certificate upwards, without roots; empty when a root signs itself."""
    root: x509.Certificate
    """The one of ``roots`` that the signer's path leads to."""
    roots: tuple[x509.Certificate, ...]
    expires: datetime
    """When the first certificate on the path to the root ends: nothing signed may outlive it."""

    def agrees_with(self, other: Material) -> bool:
        """Whether it is the same as far as anybody can see."""
        return (self.certificate, self.intermediates, self.roots) == (other.certificate, other.intermediates, other.roots)


class _Name(NamedTuple):
    """What makes a root this root."""

    subject: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class _Root:
    certificate: x509.Certificate
    trusted_from: datetime
    """From then on every certificate in use came with this root."""
    signed_until: datetime
    """When the last certificate under it ends, as far as known."""


class Succession:
    """The signer in force, the one that waits, and the roots to hand out. What was signed before this process began is taken to last
    `DEFAULT_TTL` from there, and to have come with the roots of the first material."""

    def __init__(self, material: Material, now: datetime) -> None:
        self.signer = material
        self._latest = material
        self._roots = {_name(root): _Root(root, now, now + DEFAULT_TTL) for root in material.roots}

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """What peers must trust, the latest material's first."""
        latest = {_name(root) for root in self._latest.roots}
        return (*self._latest.roots, *(root.certificate for name, root in self._roots.items() if name not in latest))

    @property
    def waits_until(self) -> datetime | None:
        """When the latest material begins to sign; None: it does."""
        return None if self.signer is self._latest else self._roots[_name(self._latest.root)].trusted_from

    def adopt(self, material: Material, now: datetime) -> None:
        """Sign with this as soon as everybody trusts its root."""
        if material.agrees_with(self._latest):
            self.advance(now)
            return
        everybody = max([now + DEFAULT_TTL, *(root.signed_until for root in self._roots.values())])
        for root in material.roots:
            before = self._roots.get(_name(root), _Root(root, everybody, now))
            self._roots[_name(root)] = replace(before, certificate=root)
        self._latest = material
        self.advance(now)

    def advance(self, now: datetime) -> None:
        """What is due by now happens."""
        if self.waits_until is not None and (now >= self.waits_until or now >= self.signer.expires):
            self.signer = self._latest
        needed = set(_names((*self._latest.roots, self.signer.root)))
        self._roots = {name: root for name, root in self._roots.items() if name in needed or root.signed_until > now}

    def note_signed(self, until: datetime) -> None:
        """The signer in force has signed a certificate that ends then."""
        name = _name(self.signer.root)
        root = self._roots[name]
        self._roots[name] = replace(root, signed_until=max(root.signed_until, until))


def _name(root: x509.Certificate) -> _Name:
    return _Name(root.subject.public_bytes(), root.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _names(roots: Iterable[x509.Certificate]) -> Iterable[_Name]:
    return map(_name, roots)
