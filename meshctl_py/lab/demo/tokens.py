"""An issuer of tokens, as tokens.yaml of the example expects it."""

from __future__ import annotations

import json
import time
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

ISSUER: Final = "https://issuer.test"
_KEY_ID: Final = "one"


class Issuer:
    """Has a key of its own, and says that it is `ISSUER`, as another issuer would who forges tokens."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(65537, 2048)

    @property
    def key_set(self) -> str:
        """What proves its tokens: a JWKS (RFC 7517)."""
        key: dict[str, Any] = RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**key, "kid": _KEY_ID, "alg": "RS256", "use": "sig"}]})

    def sign(self, **claims: object) -> str:
        """A token for a buyer of the shop, good for ten minutes, where ``claims`` say nothing else."""
        usual = {"iss": ISSUER, "sub": "ann", "aud": "shop", "exp": int(time.time()) + 600, "group": "buyers"}
        return jwt.encode({**usual, **claims}, self._key, "RS256", headers={"kid": _KEY_ID})
