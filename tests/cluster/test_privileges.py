"""Each capability of the agent is needed, and with them all it does what it must, as the manifest restricts it."""

from __future__ import annotations

import json
from typing import Any

from tests.cluster.harness.api import Object
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.images import PROJECT
from tests.cluster.mesh import SYSTEM, kustomized
from tests.cluster.workloads import addresses, apply_pods, echo_pod

TRY = """
import json, os, sys
from ipaddress import ip_address
from pathlib import Path
from mesh.linux.netns import open_netns, run_in_netns
from mesh.linux.nft import INET, Table
from mesh.linux.nft_apply import replace_tables
from mesh.linux.sockets import transparent_listener
from ztunnel_py.pods.netns_discovery import scan

uid, *texts = sys.argv[1:]
found = scan(Path(os.environ["HOST_PROC"]), {uid: tuple(map(ip_address, texts))})
results = {"find": uid in found}
def can(name, function):
    try:
        function()
        results[name] = True
    except Exception as exc:
        results[name] = False
if found:
    can("enter", lambda: run_in_netns(open_netns(found[uid]), lambda: None))
can("listen transparently", lambda: transparent_listener(15001, mark=0x539))
can("write rules", lambda: replace_tables([Table("try", (), family=INET)]))
can("write to its own files", lambda: Path("/opt/ambient-mesh/x").write_text(""))
can("signal processes of the node", lambda: os.kill(int(Path(os.environ["HOST_PROC"], "self").resolve().name), 0))
print(json.dumps(results))
"""
"""What an agent does with its privileges, each tried by itself; the last two it must not be able to do."""
NEEDED_FOR = {
    "NET_ADMIN": {"listen transparently", "write rules"},
    "SYS_ADMIN": {"enter"},
    "SYS_PTRACE": {"find", "enter"},
}


def agent_like(cluster: Cluster, name: str, without: str, target: Object) -> Object:
    """A pod with the privileges of the agent, as the manifest has them, but for one capability."""
    spec: dict[str, Any] = kustomized()["DaemonSet", SYSTEM, "ztunnel"]["spec"]["template"]["spec"]
    container = spec["containers"][0]
    security = container["securityContext"]
    security["capabilities"]["add"] = [each for each in security["capabilities"]["add"] if each != without]
    tried = {
        "name": "try",
        "image": PROJECT,
        "imagePullPolicy": "Never",
        "command": ["python3", "-c", TRY, target["metadata"]["uid"], *addresses(target)],
        "env": [entry for entry in container["env"] if entry["name"] == "HOST_PROC"],
        "securityContext": security,
        "volumeMounts": [mount for mount in container["volumeMounts"] if mount["name"] == "host-proc"],
    }
    volumes = [volume for volume in spec["volumes"] if volume["name"] == "host-proc"]
    pod = {
        "securityContext": spec["securityContext"],
        "restartPolicy": "Never",
        "nodeName": "n1",
        "containers": [tried],
        "volumes": volumes,
    }
    namespace = target["metadata"]["namespace"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": pod}


def test_each_capability_is_needed_and_no_other(cluster: Cluster) -> None:
    agent, mover = kustomized()["DaemonSet", SYSTEM, "ztunnel"]["spec"]["template"]["spec"]["containers"]
    for container, needed in ((agent, NEEDED_FOR.keys()), (mover, {"NET_ADMIN", "SYS_ADMIN"})):  # a mover finds no pods
        given = container["securityContext"]["capabilities"]
        assert given["drop"] == ["ALL"]
        assert set(given["add"]) == needed
    with cluster.namespace("privileges") as namespace:
        target = apply_pods(cluster, namespace, echo_pod("target", "n1"))["target"]
        results = {}
        for without in ("", *NEEDED_FOR):
            name = f"try-{without.lower().replace('_', '-')}".rstrip("-")
            cluster.api.apply(agent_like(cluster, name, without, target))
            wait_until(lambda name=name: ended(cluster, namespace, name), f"{name} ends")
            results[without] = json.loads(cluster.logs(namespace, name))
    never = {"write to its own files", "signal processes of the node"}
    assert {what for what, possible in results[""].items() if not possible} == never
    for capability, needs in NEEDED_FOR.items():
        assert {what for what in results[""].keys() - never if not results[capability].get(what, False)} == needs, capability


def ended(cluster: Cluster, namespace: str, name: str) -> bool:
    pod = cluster.api.find("Pod", name, namespace)
    return pod is not None and pod["status"].get("phase") in ("Succeeded", "Failed")
