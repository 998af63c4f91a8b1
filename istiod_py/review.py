"""Callers on Kubernetes: a service account token reviewed by the API server, and the live pod it is bound to."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import trio

from istiod_py.authenticate import (
    APPEARANCE_TIMEOUT,
    NOT_AUTHENTICATED,
    Caller,
    RunningPods,
    Unauthenticated,
    Undecided,
    find_gateway,
    wait_until,
)
from istiod_py.translate.waypoints import account_name
from mesh.kube.api import ApiClient, ApiError, ApiUnavailable
from mesh.kube.objects import KubeObject, mapping_at
from mesh.kube.resources import TOKEN_REVIEWS
from mesh.kube.store import ObjectStore
from mesh.telemetry.log import get_logger

AUDIENCE: Final = "istio-ca"
REMEMBERED: Final = 10.0
"""Seconds a verdict on a token is used again: an agent that starts asks for dozens of certificates at once. The pod is looked
at each time."""
_MOST_REMEMBERED: Final = 4096
_AT_ONCE: Final = 16
"""Reviews under way: whoever sends garbage must not make us a load on the API server."""
_MAX_TOKEN: Final = 16 << 10
_PREFIX: Final = "system:serviceaccount:"
_GROUP: Final = "system:serviceaccounts"
_EXTRA: Final = "authentication.kubernetes.io/"

_log = get_logger("authentication")


@dataclass(frozen=True, slots=True)
class Reviewed:
    """What the API server said of a token. Names are empty where the token is not bound to such an object."""

    namespace: str
    service_account: str
    pod: str
    pod_uid: str
    node: str


class NotBelieved(Exception):
    """Why a token or its pod is not good enough; for our log."""


def read_review(review: Mapping[str, object], audience: str) -> Reviewed:
    """Raises NotBelieved unless the token is that of a service account, for ``audience``."""
    status = mapping_at(review, "status")
    if status.get("authenticated") is not True:
        raise NotBelieved(str(status.get("error") or "the API server does not know the token"))
    audiences = status.get("audiences")
    if not isinstance(audiences, list) or audience not in audiences:
        raise NotBelieved(f"the token is not for audience {audience}")
    user = mapping_at(status, "user")
    groups = user.get("groups")
    namespace, colon, account = str(user.get("username")).removeprefix(_PREFIX).partition(":")
    is_account = str(user.get("username")).startswith(_PREFIX) and isinstance(groups, list) and _GROUP in groups
    if not (is_account and colon and namespace and account):
        raise NotBelieved(f"{user.get('username')} is no service account")
    extra = mapping_at(user, "extra")
    return Reviewed(namespace, account, *(_only(extra, f"{_EXTRA}{key}") for key in ("pod-name", "pod-uid", "node-name")))


def _only(extra: Mapping[str, object], key: str) -> str:
    values = extra.get(key)
    return str(values[0]) if isinstance(values, list) and len(values) == 1 else ""


def find_node(reviewed: Reviewed, pod: KubeObject | None) -> str:
    """The node of the pod that the token is bound to. Raises NotBelieved where the token and the live pod disagree."""
    name = f"pod {reviewed.namespace}/{reviewed.pod}"
    if not (reviewed.pod and reviewed.pod_uid):
        raise NotBelieved("the token is not bound to a pod")
    if pod is None:
        raise NotBelieved(f"there is no {name}")
    if pod.uid != reviewed.pod_uid:
        raise NotBelieved(f"{name} is another one by now (uid {pod.uid}, the token's is {reviewed.pod_uid})")
    account = pod.spec.get("serviceAccountName") or "default"
    if account != reviewed.service_account:
        raise NotBelieved(f"{name} runs as {account}, not as {reviewed.service_account}")
    node = pod.spec.get("nodeName")
    if not isinstance(node, str) or not node:
        raise NotBelieved(f"{name} is on no node yet")
    if reviewed.node not in ("", node):
        raise NotBelieved(f"{name} is on node {node}, the token is of node {reviewed.node}")
    if pod.status.get("phase") in ("Succeeded", "Failed"):
        raise NotBelieved(f"{name} has ended")
    return node


class ReviewAuthenticator:
    """``authorization: Bearer <token>`` of a node agent's pod or a waypoint's. Others are refused: nobody else calls us so far."""

    def __init__(
        self,
        client: ApiClient,
        store: ObjectStore,
        pods: RunningPods,
        trusted: frozenset[str],
        *,
        audience: str = AUDIENCE,
        timeout: float = APPEARANCE_TIMEOUT,
    ) -> None:
        """``trusted``: ``namespace/serviceaccount`` of those that may ask for the identities of their node's pods."""
        self._client = client
        self._store = store
        self._pods = pods
        self._trusted = trusted
        self._audience = audience
        self._timeout = timeout
        self._verdicts: OrderedDict[bytes, tuple[float, Reviewed | str]] = OrderedDict()
        self._slots = trio.CapacityLimiter(_AT_ONCE)

    async def authenticate(self, metadata: Mapping[str, str], *, fresh: bool = False) -> Caller:
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN:
            await trio.lowlevel.checkpoint()
            raise Unauthenticated(NOT_AUTHENTICATED)
        try:
            reviewed = await self._review(token, fresh)
            self._refuse_others(reviewed)
            node = await self._locate(reviewed)
            return Caller(node, reviewed.namespace, reviewed.service_account, self._find_role(reviewed))
        except NotBelieved as exc:
            _log.warning("token.refused", because=str(exc))
            raise Unauthenticated(NOT_AUTHENTICATED) from exc

    def _refuse_others(self, reviewed: Reviewed) -> None:
        """Most that a cluster runs has no business here, and is not waited for."""
        account = f"{reviewed.namespace}/{reviewed.service_account}"
        gateways = (gateway for gateway in self._store.objects("Gateway") if gateway.namespace == reviewed.namespace)
        if account not in self._trusted and all(account_name(gateway) != reviewed.service_account for gateway in gateways):
            raise NotBelieved(f"{account} is neither a trusted node account nor that of a waypoint")

    def _find_role(self, reviewed: Reviewed) -> str:
        """Empty for a node's agent, else the Gateway whose waypoint it is. The pod was found, and is the token's own."""
        if f"{reviewed.namespace}/{reviewed.service_account}" in self._trusted:
            return ""
        pod = self._find_pod(reviewed)
        gateway = find_gateway(self._store, pod) if pod is not None else ""
        if not gateway:
            raise NotBelieved(f"pod {reviewed.namespace}/{reviewed.pod} is no waypoint, though it runs as one")
        return gateway

    async def _locate(self, reviewed: Reviewed) -> str:
        """Waits a moment for a pod that we have not heard of: an agent is up sooner than its status."""

        def known() -> bool:
            pod = self._find_pod(reviewed)
            return pod is not None and pod.uid == reviewed.pod_uid and bool(pod.spec.get("nodeName"))

        if reviewed.pod:
            with trio.move_on_after(self._timeout):
                await wait_until(known, self._pods.wait_changed)
        return find_node(reviewed, self._find_pod(reviewed))

    def _find_pod(self, reviewed: Reviewed) -> KubeObject | None:
        return self._store.find("Pod", reviewed.namespace, reviewed.pod)

    async def _review(self, token: str, fresh: bool) -> Reviewed:
        """Raises NotBelieved; Undecided when nobody can say."""
        digest = hashlib.sha256(token.encode("utf-8", "replace")).digest()
        async with self._slots:
            until, verdict = self._verdicts.get(digest, (float("-inf"), ""))
            if fresh or trio.current_time() >= until:
                verdict = await self._ask(token)
                self._verdicts[digest] = (trio.current_time() + REMEMBERED, verdict)
                self._verdicts.move_to_end(digest)
                while len(self._verdicts) > _MOST_REMEMBERED:
                    self._verdicts.popitem(last=False)
        if isinstance(verdict, str):
            raise NotBelieved(verdict)
        return verdict

    async def _ask(self, token: str) -> Reviewed | str:
        spec = {"token": token, "audiences": [self._audience]}
        body = {"apiVersion": TOKEN_REVIEWS.api_version, "kind": TOKEN_REVIEWS.kind, "spec": spec}
        try:
            return read_review(await self._client.create(TOKEN_REVIEWS.collection(), body), self._audience)
        except NotBelieved as exc:
            return str(exc)
        except (ApiError, ApiUnavailable) as exc:
            raise Undecided(f"the API server can't review tokens: {exc}") from exc
