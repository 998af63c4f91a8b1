"""The pods of this node as a directory of Kubernetes objects describes them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Final

import trio

from mesh.kube.directory import DirectoryStore
from mesh.kube.pod import KubePod, read_pod
from mesh.kube.store import ObjectStore
from mesh.model.enrolment import EXCLUDED_NAMESPACES, Enrolment, decide_enrolment
from mesh.model.labels import BYPASS_INBOUND_CAPTURE, DNS_CAPTURE, NETNS, REDIRECTION
from ztunnel_py.pods.facts import PodFacts

NO_ADDRESS: Final = "the pod has no IP address yet"
_BOOLEANS: Final = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
"""What Go's ParseBool takes for true and false, as Istio reads annotations; anything else is ignored."""


def read_node_pods(store: ObjectStore, node: str, *, excluded_namespaces: frozenset[str] = EXCLUDED_NAMESPACES) -> dict[str, PodFacts]:
    """All pods on ``node`` by uid, enrolled or not. Pods that cannot be read, or have no uid yet, are not there yet."""
    namespaces = {obj.name: obj.labels for obj in store.objects("Namespace")}
    found: dict[str, PodFacts] = {}
    for obj in store.objects("Pod"):
        pod, problems = read_pod(obj)
        if pod.node == node and pod.uid and not problems:
            found[pod.uid] = _facts(pod, namespaces.get(pod.namespace, {}), excluded_namespaces)
    return found


async def watch_node_pods(
    store: DirectoryStore, node: str, *, excluded_namespaces: frozenset[str] = EXCLUDED_NAMESPACES
) -> AsyncGenerator[Mapping[str, PodFacts], None]:
    """The pods of the node, at once and whenever they change. Use with `contextlib.aclosing`; nobody else may watch ``store``."""
    await trio.to_thread.run_sync(store.load)
    pods = read_node_pods(store, node, excluded_namespaces=excluded_namespaces)
    yield pods
    async with aclosing(store.watch()) as changes:
        async for _ in changes:
            now = read_node_pods(store, node, excluded_namespaces=excluded_namespaces)
            if now != pods:
                pods = now
                yield pods


def _facts(pod: KubePod, namespace_labels: Mapping[str, str], excluded_namespaces: frozenset[str]) -> PodFacts:
    netns_path = pod.annotations.get(NETNS, "")

    def decide(*, host_network: bool) -> Enrolment:
        return decide_enrolment(
            namespace=pod.namespace,
            namespace_labels=namespace_labels,
            pod_labels=pod.labels,
            pod_annotations=pod.annotations,
            host_network=host_network,
            phase=pod.phase,
            excluded_namespaces=excluded_namespaces,
        )

    labelled = decide(host_network=False) if pod.host_network else None
    return PodFacts(
        uid=pod.uid,
        name=pod.name,
        namespace=pod.namespace,
        service_account=pod.service_account,
        enrolment=decide(host_network=pod.host_network),
        ips=pod.ips,
        netns_path=netns_path,
        bypass_inbound=_BOOLEANS.get(pod.annotations.get(BYPASS_INBOUND_CAPTURE, ""), False),
        dns=_BOOLEANS.get(pod.annotations.get(DNS_CAPTURE, "")),
        waiting_for=_waiting_for(pod, netns_path),
        redirection=pod.annotations.get(REDIRECTION, ""),
        unsupported=f"{labelled.because}, but the pod is on the host's network: it stays outside the mesh" if labelled else "",
    )


def _waiting_for(pod: KubePod, netns_path: str) -> str:
    if not pod.ips:
        return NO_ADDRESS
    if not netns_path:
        return f"the pod's network namespace is not known yet (annotation {NETNS})"
    return ""
