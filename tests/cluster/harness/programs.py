"""The command lines and configuration files of the cluster's programs. Pure, but for what `lay_out_node` writes."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any, Final

from tests.cluster.harness.assign import (
    API_PORT,
    CONTROL_PLANE,
    DNS_SERVICE,
    DOMAIN,
    POD_RANGES,
    SERVICE_RANGES,
    NodeAssignment,
)
from tests.cluster.harness.home import ClusterHome, NodeHome
from tests.cluster.harness.images import PAUSE

ETCD: Final = "http://127.0.0.1:2379"
PROGRAMS: Final = "/opt/kubernetes/bin"
"""Where a node has the binaries of Kubernetes."""
_CONFIG: Final = "/etc/kubernetes"
_AUDIT_POLICY: Final = Path(__file__).with_name("audit-policy.yaml")
_MAX_PODS: Final = 250
_PLUGINS: Final = ("bandwidth", "host-local", "loopback", "portmap", "ptp")
_CONTAINERD: Final = f"""version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# Without CAP_SYS_RESOURCE runc could not lower the score and would end.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


def etcd(program: Path, home: ClusterHome) -> tuple[str, ...]:
    return (
        *(str(program), f"--data-dir={home.etcd}", "--name=etcd", "--logger=zap", "--log-level=warn"),
        *(f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}", "--listen-peer-urls=http://127.0.0.1:2380"),
        *("--initial-advertise-peer-urls=http://127.0.0.1:2380", "--initial-cluster=etcd=http://127.0.0.1:2380"),
    )


def api_server(programs: Path, home: ClusterHome, *, dual_stack: bool) -> tuple[str, ...]:
    own = home.credentials
    return (
        str(programs / "kube-apiserver"),
        *(f"--etcd-servers={ETCD}", f"--advertise-address={CONTROL_PLANE[0]}", f"--secure-port={API_PORT}", "--allow-privileged=true"),
        *(f"--tls-cert-file={own}/apiserver.crt", f"--tls-private-key-file={own}/apiserver.key", f"--client-ca-file={own}/ca.crt"),
        *(f"--kubelet-client-certificate={own}/kubelet-client.crt", f"--kubelet-client-key={own}/kubelet-client.key"),
        # Else exec and logs look the names of nodes up in a DNS that doesn't know them.
        *(f"--kubelet-certificate-authority={own}/ca.crt", "--kubelet-preferred-address-types=InternalIP"),
        *(f"--service-account-key-file={own}/service-accounts.crt", f"--service-account-signing-key-file={own}/service-accounts.key"),
        f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
        f"--service-cluster-ip-range={_ranges(SERVICE_RANGES, dual_stack)}",
        *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
        *(f"--audit-policy-file={_AUDIT_POLICY}", f"--audit-log-path={home.audit}", "--audit-log-batch-max-wait=1s"),
        # The control plane has no kube-proxy: webhooks are called at their endpoints, which it can route to.
        "--enable-aggregator-routing=true",
    )


def controller_manager(programs: Path, home: ClusterHome) -> tuple[str, ...]:
    own = home.credentials
    return (
        *(str(programs / "kube-controller-manager"), f"--kubeconfig={own}/controller-manager.kubeconfig", "--leader-elect=false"),
        *(f"--root-ca-file={own}/ca.crt", f"--service-account-private-key-file={own}/service-accounts.key"),
        *(f"--cluster-signing-cert-file={own}/ca.crt", f"--cluster-signing-key-file={own}/ca.key"),
        *("--use-service-account-credentials=true", "--allocate-node-cidrs=false", "--bind-address=127.0.0.1"),
        *("--kube-api-qps=200", "--kube-api-burst=400"),
    )


def scheduler(programs: Path, home: ClusterHome) -> tuple[str, ...]:
    return (
        *(str(programs / "kube-scheduler"), f"--kubeconfig={home.credentials}/scheduler.kubeconfig", "--leader-elect=false"),
        *("--bind-address=127.0.0.1", "--kube-api-qps=200", "--kube-api-burst=400"),
    )


def containerd() -> tuple[str, ...]:
    return ("containerd", "--log-level=warn")


def kubelet(node: NodeAssignment) -> tuple[str, ...]:
    where = (f"--hostname-override={node.name}", f"--node-ip={','.join(node.addresses)}")
    return (f"{PROGRAMS}/kubelet", f"--config={_CONFIG}/kubelet.json", f"--kubeconfig={_CONFIG}/kubelet.kubeconfig", *where, "--v=1")


def kube_proxy() -> tuple[str, ...]:
    return (f"{PROGRAMS}/kube-proxy", f"--config={_CONFIG}/proxy.json")


def lay_out_node(home: ClusterHome, node: NodeAssignment, tree: Path) -> None:
    """Write all files of a node into its overlay's upper directory."""
    own = home.node(node.name)
    config = own.upper / _CONFIG.lstrip("/")
    config.mkdir(parents=True)
    (config / "kubelet.json").write_text(json.dumps(_kubelet_config(), indent=2))
    (config / "proxy.json").write_text(json.dumps(_proxy_config(node), indent=2))
    (config / "resolv.conf").write_text("# The cluster's DNS answers pods; nobody answers the node.\n")
    for name in ("kubelet.kubeconfig", "proxy.kubeconfig", "kubelet.crt", "kubelet.key"):
        shutil.copy(home.credentials / (f"{node.name}-{name}" if name.startswith("kubelet") else name), config / name)
    shutil.copy(home.credentials / "ca.crt", config / "ca.crt")
    _lay_out_network(own, node, tree)
    for name, content in (
        ("containerd/config.toml", _CONTAINERD),
        ("hostname", f"{node.name}\n"),
        ("machine-id", f"{uuid.uuid4().hex}\n"),
        ("hosts", f"127.0.0.1 localhost\n::1 localhost\n{node.addresses[0]} {node.name}\n"),
        ("resolv.conf", ""),
    ):
        path = own.upper / "etc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)


def _lay_out_network(own: NodeHome, node: NodeAssignment, tree: Path) -> None:
    plugins = own.upper / "opt/cni/bin"
    plugins.mkdir(parents=True)
    for name in _PLUGINS:
        shutil.copy(tree / "usr/lib/cni" / name, plugins / name)  # no link: whoever overwrites one there must not reach the cache
    chain = own.upper / "etc/cni/net.d"
    chain.mkdir(parents=True)
    defaults = ("0.0.0.0/0", "::/0")[: len(node.pod_ranges)]
    addresses = {
        "type": "host-local",
        "dataDir": "/run/cni/addresses",  # a rebooted node has no pods, so it has given away no address
        "ranges": [[{"subnet": subnet}] for subnet in node.pod_ranges],
        "routes": [{"dst": destination} for destination in defaults],
    }
    plugin = {"type": "ptp", "ipMasq": False, "ipam": addresses}
    text = json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]}, indent=2)
    (chain / "10-pods.conflist").write_text(text)


def _kubelet_config() -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": f"{_CONFIG}/ca.crt"}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{_CONFIG}/kubelet.crt",
        "tlsPrivateKeyFile": f"{_CONFIG}/kubelet.key",
        "readOnlyPort": 0,
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": DOMAIN,
        "resolvConf": f"{_CONFIG}/resolv.conf",
        "maxPods": _MAX_PODS,
        "syncFrequency": "10s",  # a changed ConfigMap or Secret is seen in its volume so soon, instead of within a minute and a half
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": True,  # agents find a pod's processes by the path that this makes
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "failCgroupV1": False,
        "makeIPTablesUtilChains": False,
        "localStorageCapacityIsolation": False,
        "evictionHard": {},
        "imageGCHighThresholdPercent": 100,  # never: what is not in the cache can't be pulled again
        "imageGCLowThresholdPercent": 99,
        "oomScoreAdj": 0,
        "serializeImagePulls": False,
        "eventRecordQPS": 0,
        "kubeAPIQPS": 200,
        "kubeAPIBurst": 400,
    }


def _proxy_config(node: NodeAssignment) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{_CONFIG}/proxy.kubeconfig"},
        "hostnameOverride": node.name,
        "mode": "nftables",
        "clusterCIDR": _ranges(POD_RANGES, len(node.addresses) > 1),
        "nodeIPOverride": list(node.addresses),
        "conntrack": {"maxPerCore": 0, "min": 0},  # a limit of the machine's kernel, not ours to set
        "nftables": {"minSyncPeriod": "100ms"},
        "oomScoreAdj": 0,
    }


def _ranges(both: tuple[str, str], dual_stack: bool) -> str:
    return ",".join(both[: 1 + dual_stack])
