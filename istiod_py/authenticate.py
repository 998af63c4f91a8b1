"""Who calls, and whose certificate the caller may have: the two gates before the certificate authority signs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from istiod_py.tokens import TokenStore
from mesh.model.identity import InvalidSpiffeId, SpiffeId

APPEARANCE_TIMEOUT: Final = 3.0
"""Seconds a request waits for the pod it speaks for: an agent may know its pod before we do."""


class Unauthenticated(Exception):
    """The caller did not prove who it is. The text is for the caller and tells nothing an attacker could use."""


class Undecided(Exception):
    """Nobody can say now who the caller is; trying later may help. The text is for our log."""


class IdentityRefused(Exception):
    """The caller may not have this identity. The text is for our log; the caller is told ``REFUSED`` only."""


CONFIRM_EVERY: Final = 10.0
"""Seconds between proofs of a caller that stays connected: how long a token that is revoked is still good for."""
REFUSED: Final = "request impersonation authentication failure"
NOT_AUTHENTICATED: Final = "request authenticate failure"


@dataclass(frozen=True, slots=True)
class Caller:
    """A proven caller: the node it runs on and the service account it runs as."""

    node: str
    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.service_account} on {self.node}"


class Authenticator(Protocol):
    """Proves a caller from the metadata of its call. Implementations: tokens of our own (lab); TokenReview (Kubernetes)."""

    async def authenticate(self, metadata: Mapping[str, str], *, fresh: bool = False) -> Caller:
        """``fresh``: whatever was found out before. Raises Unauthenticated, Undecided."""


class TokenAuthenticator:
    """``authorization: Bearer <token>`` with a token of `TokenStore`. Whoever holds a node's token is that node's agent."""

    def __init__(self, tokens: TokenStore, namespace: str, service_account: str = "ztunnel") -> None:
        self._tokens = tokens
        self._namespace = namespace
        self._service_account = service_account

    async def authenticate(self, metadata: Mapping[str, str], *, fresh: bool = False) -> Caller:
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        node = self._tokens.find_node(token) if scheme.lower() == "bearer" and token else None
        await trio.lowlevel.checkpoint()
        if node is None:
            raise Unauthenticated(NOT_AUTHENTICATED)
        return Caller(node, self._namespace, self._service_account)


class RunningPods(Protocol):
    """What the authorizer must know of the cluster."""

    def runs_on(self, node: str, namespace: str, service_account: str) -> bool:
        """Whether a pod that has not ended, with this service account, is assigned to the node now."""

    async def wait_changed(self) -> None:
        """Until the answer of `runs_on` may have changed."""


@dataclass(frozen=True, slots=True)
class NodeAuthorizer:
    """A node may have the identities of the pods that run on it, and no others (Istio's node authorizer)."""

    trust_domain: str
    pods: RunningPods
    timeout: float = APPEARANCE_TIMEOUT

    async def authorize(self, caller: Caller, requested: str) -> SpiffeId:
        """The identity as a value, if the caller may have it; waits a moment for its pod to appear. Raises IdentityRefused."""
        try:
            identity = SpiffeId.parse(requested)
        except InvalidSpiffeId as exc:
            raise IdentityRefused(str(exc)) from exc
        if identity.trust_domain != self.trust_domain:
            raise IdentityRefused(f"trust domain {identity.trust_domain!r} is not ours ({self.trust_domain})")
        with trio.move_on_after(self.timeout):
            await wait_until(lambda: self.pods.runs_on(caller.node, identity.namespace, identity.service_account), self.pods.wait_changed)
            return identity
        raise IdentityRefused(f"no pod of {identity.namespace}/{identity.service_account} runs on node {caller.node}")


async def wait_until(holds: Callable[[], bool], wait_changed: Callable[[], Awaitable[None]]) -> None:
    """Return once ``holds``; asks again after every change."""
    while not holds():
        await wait_changed()
