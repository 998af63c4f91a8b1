"""A Rust ztunnel pair: dedicated mode, its mesh from a local file, certificates from its built-in test authority.

The binary must have been built with ``--features testing``, which the authority needs (reference: ztunnel's ``Development.md``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from mesh.model.ports import PROXY_MARK


def local_mesh(namespace: str, client_ip: str, server_ip: str) -> str:
    """Both pods, and the policy that our own pair has. YAML, of which JSON is a part but for the tag."""
    pods = [
        {
            "uid": f"Kubernetes//Pod/{namespace}/{name}",
            "name": name,
            "namespace": namespace,
            "serviceAccount": name,
            "trustDomain": "cluster.local",
            "workloadIps": [ip],
            "protocol": "HBONE",
            "node": node,
            "services": {},
            "authorizationPolicies": [],
        }
        for name, ip, node in (("client", client_ip, "n1"), ("server", server_ip, "n2"))
    ]
    principal = json.dumps(f"cluster.local/ns/{namespace}/sa/client")
    policy = (
        f"{{name: callers, namespace: {namespace}, scope: Namespace, action: Allow, dryRun: false, "
        f"rules: [[[{{principals: [!Exact {principal}]}}]]]}}"
    )
    return f"workloads: {json.dumps(pods)}\nservices: []\npolicies: [{policy}]\n"


def environment(namespace: str, name: str, node: str, mesh: str, *, tunnel_each: bool) -> Mapping[str, str]:
    """Of the ztunnel in the pod ``name``, which runs under a service account of the same name."""
    return {
        "PROXY_MODE": "dedicated",
        "PROXY_WORKLOAD_INFO": f"{namespace}/{name}/{name}",
        "NODE_NAME": node,
        "LOCAL_XDS": mesh,
        "XDS_ADDRESS": "",
        "FAKE_CA": "true",
        "ENABLE_ORIG_SRC": "false",
        "PACKET_MARK": str(PROXY_MARK),
        "ISTIO_META_DNS_CAPTURE": "false",
        "ZTUNNEL_WORKER_THREADS": "1",
    } | ({"POOL_MAX_STREAMS_PER_CONNECTION": "1", "POOL_UNUSED_RELEASE_TIMEOUT": "100ms"} if tunnel_each else {})
