"""Key sets (RFC 7517) and what is signed with their keys. Asymmetric keys alone: who can verify must not be able to sign.

A set comes from a stranger. It is bounded before anything is computed with it, and a key that we cannot use is passed over with a reason,
so that one odd key does not take the others with it.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm
from jwt.exceptions import InvalidKeyError

MAX_KEY_SET: Final = 1 << 20
"""Bytes of a key set."""
MAX_KEYS: Final = 64
"""Keys of one set; real ones have two or three. A token without ``kid`` is tried with all of them, at 30 us each."""
_MAX_MEMBER: Final = 1400
"""Characters of a number in a key: an RSA modulus of 8192 bits."""
_RSA_BITS: Final = range(1024, 8193)

_Verify: TypeAlias = Callable[[bytes, bytes], bool]
"""Whether a text (first) has this signature."""


class InvalidKeySet(ValueError):
    """The text is no key set, or none of its keys is of use."""


@dataclass(frozen=True, slots=True)
class Key:
    """A public key and the algorithms that it may verify."""

    kid: str
    alg: str
    """The one algorithm that it is for; empty: any of its kind."""
    algorithms: Mapping[str, _Verify]


class KeySet:
    """The keys of one issuer at one time. What they have verified is remembered with them, so that it ends when they are replaced."""

    __slots__ = ("__weakref__", "keys", "skipped", "verified")

    def __init__(self, keys: tuple[Key, ...], skipped: tuple[str, ...] = ()) -> None:
        self.keys = keys
        self.skipped = skipped
        """Why keys were passed over."""
        self.verified: dict[bytes, object] = {}
        """For whoever verifies with it: bounded there."""

    @classmethod
    def parse(cls, text: bytes | str) -> KeySet:
        """Raises InvalidKeySet."""
        found = _read(text)
        keys: list[Key] = []
        skipped: list[str] = []
        for index, entry in enumerate(found):
            try:
                keys.append(_read_key(entry))
            except _Unusable as exc:
                skipped.append(f"key {index}: {exc}")
        if not keys:
            raise InvalidKeySet("no key that can be used" + "".join(f"; {reason}" for reason in skipped[:3]))
        return cls(tuple(keys), tuple(skipped))

    def verify(self, kid: str, alg: str, text: bytes, signature: bytes) -> bool | None:
        """Whether one of the keys made the signature. None: no key has this ``kid`` and may be used with this algorithm."""
        candidates = False
        for key in self.keys:
            if (kid and key.kid and kid != key.kid) or (key.alg and key.alg != alg):
                continue
            candidates = True
            verify = key.algorithms.get(alg)
            if verify is not None and verify(text, signature):
                return True
        return False if candidates else None


class _Unusable(ValueError):
    """Why a key is passed over."""


def _read(text: bytes | str) -> list[object]:
    if len(text) > MAX_KEY_SET:
        raise InvalidKeySet(f"larger than {MAX_KEY_SET >> 20} MiB")
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as exc:
        raise InvalidKeySet(f"no JSON: {exc}") from exc
    keys = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(keys, list):
        raise InvalidKeySet('no object with a list "keys"')
    if len(keys) > MAX_KEYS:
        raise InvalidKeySet(f"{len(keys)} keys are more than {MAX_KEYS}")
    return keys


def _read_key(entry: object) -> Key:
    if not isinstance(entry, dict):
        raise _Unusable("no object")
    fields = {name: value for name, value in entry.items() if isinstance(value, str) and len(value) <= _MAX_MEMBER}
    if fields.get("use", "sig") != "sig":
        raise _Unusable(f"for use {fields['use'][:20]!r}")
    operations = entry.get("key_ops")
    if isinstance(operations, list) and "verify" not in operations:
        raise _Unusable("not for verifying")
    make = _KINDS.get(fields.get("kty", ""))
    if make is None:
        raise _Unusable(f"of kind {fields.get('kty', '')[:20]!r}")
    try:
        algorithms = make(fields)
    except (InvalidKeyError, UnsupportedAlgorithm, ValueError, TypeError, OverflowError, binascii.Error) as exc:
        raise _Unusable(str(exc)[:100] or type(exc).__name__) from exc
    alg = fields.get("alg", "")
    if alg and alg not in algorithms:
        raise _Unusable(f"for algorithm {alg[:20]!r}")
    return Key(fields.get("kid", ""), alg, algorithms)


def _public(fields: Mapping[str, str], *names: str) -> dict[str, object]:
    """The members that a public key has: whatever else stands there, a private key above all, is not looked at."""
    return {name: fields[name] for name in ("kty", *names) if name in fields}


def _rsa(fields: Mapping[str, str]) -> Mapping[str, _Verify]:
    key = RSAAlgorithm.from_jwk(_public(fields, "n", "e"))
    if not isinstance(key, RSAPublicKey) or key.key_size not in _RSA_BITS:
        raise _Unusable("RSA of an unusual size")
    return {
        **{f"RS{bits}": _with_rsa(RSAAlgorithm(getattr(RSAAlgorithm, f"SHA{bits}")), key) for bits in (256, 384, 512)},
        **{f"PS{bits}": _with_rsa(RSAPSSAlgorithm(getattr(RSAAlgorithm, f"SHA{bits}")), key) for bits in (256, 384, 512)},
    }


def _with_rsa(algorithm: RSAAlgorithm, key: RSAPublicKey) -> _Verify:
    return lambda text, signature: algorithm.verify(text, key, signature)


def _ec(fields: Mapping[str, str]) -> Mapping[str, _Verify]:
    bits = _CURVES.get(fields.get("crv", ""))
    if bits is None:
        raise _Unusable(f"on curve {fields.get('crv', '')[:20]!r}")
    key = ECAlgorithm.from_jwk(_public(fields, "crv", "x", "y"))
    assert isinstance(key, EllipticCurvePublicKey)
    algorithm = ECAlgorithm(getattr(ECAlgorithm, f"SHA{bits}"))
    return {f"ES{bits}": lambda text, signature: algorithm.verify(text, key, signature)}


_CURVES: Final = {"P-256": 256, "P-384": 384, "P-521": 512}


def _okp(fields: Mapping[str, str]) -> Mapping[str, _Verify]:
    key = OKPAlgorithm.from_jwk(_public(fields, "crv", "x"))
    if not isinstance(key, Ed25519PublicKey):
        raise _Unusable(f"on curve {fields.get('crv', '')[:20]!r}")
    algorithm = OKPAlgorithm()
    return {"EdDSA": lambda text, signature: algorithm.verify(text, key, signature)}


_KINDS: Final[dict[str, Callable[[Mapping[str, str]], Mapping[str, _Verify]]]] = {"RSA": _rsa, "EC": _ec, "OKP": _okp}

ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"},
)
"""What a token may be signed with: no shared secrets (HS256 ...), and never ``none``."""
