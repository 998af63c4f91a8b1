"""Who calls, and whose certificate the caller may have: the two gates before the certificate authority signs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from istiod_py.tokens import PodName, TokenStore
from istiod_py.translate.waypoints import account_name
from mesh.kube.objects import KubeObject
from mesh.kube.store import ObjectStore
from mesh.model.identity import InvalidSpiffeId, SpiffeId
from mesh.model.labels import GATEWAY_NAME

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
    gateway: str = ""
    """The Gateway (of ``namespace``) that it is a waypoint of; empty: it is its node's agent."""

    @property
    def waypoint(self) -> str:
        """``namespace/name`` of the Gateway, or empty."""
        return f"{self.namespace}/{self.gateway}" if self.gateway else ""

    def __str__(self) -> str:
        what = f"waypoint {self.waypoint}, " if self.gateway else ""
        return f"{what}{self.namespace}/{self.service_account} on {self.node}"


class Authenticator(Protocol):
    """Proves a caller from the metadata of its call. Implementations: tokens of our own (lab); TokenReview (Kubernetes)."""

    async def authenticate(self, metadata: Mapping[str, str], *, fresh: bool = False) -> Caller:
        """``fresh``: whatever was found out before. Raises Unauthenticated, Undecided."""


class TokenAuthenticator:
    """``authorization: Bearer <token>`` with a token of `TokenStore`. Whoever holds a node's token is that node's agent; whoever holds a
    pod's is that pod, and let in if it is a waypoint."""

    def __init__(self, tokens: TokenStore, namespace: str, store: ObjectStore | None = None, service_account: str = "ztunnel") -> None:
        """``store`` has the pods; None: there are none."""
        self._tokens = tokens
        self._namespace = namespace
        self._store = store
        self._service_account = service_account

    async def authenticate(self, metadata: Mapping[str, str], *, fresh: bool = False) -> Caller:
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        holder = self._tokens.find_holder(token) if scheme.lower() == "bearer" and token else None
        await trio.lowlevel.checkpoint()
        caller = Caller(holder, self._namespace, self._service_account) if isinstance(holder, str) else self._find_waypoint(holder)
        if caller is None:
            raise Unauthenticated(NOT_AUTHENTICATED)
        return caller

    def _find_waypoint(self, holder: PodName | None) -> Caller | None:
        pod = self._store.find("Pod", *holder) if self._store is not None and holder is not None else None
        if pod is None or self._store is None:
            return None
        gateway, node = find_gateway(self._store, pod), pod.spec.get("nodeName")
        return Caller(str(node), pod.namespace, account_of(pod), gateway) if gateway and node else None


def account_of(pod: KubeObject) -> str:
    """The service account that a pod runs as."""
    return str(pod.spec.get("serviceAccountName") or pod.spec.get("serviceAccount") or "default")


def find_gateway(store: ObjectStore, pod: KubeObject) -> str:
    """The Gateway that a pod is a waypoint of, or empty. The pod's label alone proves nothing: it must run as the service account that the
    Gateway's pods have."""
    name = pod.labels.get(GATEWAY_NAME)
    gateway = store.find("Gateway", pod.namespace, name) if name else None
    if gateway is None or name is None:
        return ""
    return name if account_of(pod) == account_name(gateway) else ""


class RunningPods(Protocol):
    """What the authorizer must know of the cluster."""

    def runs_on(self, node: str, namespace: str, service_account: str) -> bool:
        """Whether a pod that has not ended, with this service account, is assigned to the node now."""

    async def wait_changed(self) -> None:
        """Until the answer of `runs_on` may have changed."""


@dataclass(frozen=True, slots=True)
class NodeAuthorizer:
    """A node may have the identities of the pods that run on it, and no others (Istio's node authorizer); a waypoint its own alone."""

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
        if caller.gateway:
            await trio.lowlevel.checkpoint()
            if (identity.namespace, identity.service_account) == (caller.namespace, caller.service_account):
                return identity
            raise IdentityRefused(f"{caller} may have its own identity alone")
        with trio.move_on_after(self.timeout):
            await wait_until(lambda: self.pods.runs_on(caller.node, identity.namespace, identity.service_account), self.pods.wait_changed)
            return identity
        raise IdentityRefused(f"no pod of {identity.namespace}/{identity.service_account} runs on node {caller.node}")


async def wait_until(holds: Callable[[], bool], wait_changed: Callable[[], Awaitable[None]]) -> None:
    """Return once ``holds``; asks again after every change."""
    while not holds():
        await wait_changed()
