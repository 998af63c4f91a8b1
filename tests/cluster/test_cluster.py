"""The cluster itself: what every other test here takes for granted."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from tests.cluster.harness.api import Object, condition
from tests.cluster.harness.client import Cluster, wait_until
from tests.cluster.harness.images import PROJECT, PYTHON
from tests.cluster.harness.keeper import all_ready

WEB = f"""
apiVersion: v1
kind: Pod
metadata:
  name: NAME
  labels: {{app: web}}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 0
  containers:
  - name: web
    image: {PYTHON}
    imagePullPolicy: Never
    command: [python3, -u, -m, http.server, --bind, "::", --directory, /etc, "8080"]
    readinessProbe:
      httpGet: {{port: 8080, path: /hostname}}
      periodSeconds: 1
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  selector: {app: web}
  ipFamilyPolicy: PreferDualStack
  ports: [{port: 80, targetPort: 8080}]
"""
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode().strip())"
LOOK_UP = "import sys, socket; print(sorted({entry[4][0] for entry in socket.getaddrinfo(sys.argv[1], 80)}))"


@pytest.fixture(scope="module")
def web(cluster: Cluster) -> Iterator[dict[str, Object]]:
    """A web server on each node, and a Service of all; pods by name."""
    with cluster.namespace("web") as namespace:
        names = {f"web-{node.name}": node.name for node in cluster.nodes}
        manifests = [WEB.replace("NAME", name).replace("NODE", node) for name, node in names.items()]
        cluster.apply("---".join([*manifests, SERVICE]), namespace)
        pods = cluster.wait_ready(namespace, *names)
        yield {pod["metadata"]["name"]: pod for pod in pods}


def fetch(cluster: Cluster, pod: str, url: str) -> str:
    return cluster.exec("web", pod, "python3", "-c", FETCH, url).strip()


def test_all_nodes_and_the_dns_are_ready(cluster: Cluster) -> None:
    assert all_ready(cluster.api, len(cluster.nodes))
    assert {node["metadata"]["name"] for node in cluster.api.list("Node")} == {"n1", "n2"}


def test_pods_of_different_nodes_reach_each_other_at_their_addresses(cluster: Cluster, web: dict[str, Object]) -> None:
    addresses = [address["ip"] for address in web["web-n2"]["status"]["podIPs"]]
    assert len(addresses) == 2
    for address in addresses:
        host = f"[{address}]" if ":" in address else address
        assert fetch(cluster, "web-n1", f"http://{host}:8080/hostname") == "web-n2"


def test_a_service_answers_at_its_addresses_from_every_node(cluster: Cluster, web: dict[str, Object]) -> None:
    service = cluster.api.find("Service", "web", "web")
    assert service is not None
    for address in service["spec"]["clusterIPs"]:
        url = f"http://[{address}]/hostname" if ":" in address else f"http://{address}/hostname"
        for name in web:
            answers: set[str] = set()
            wait_until(lambda name=name, url=url, answers=answers: answers.add(fetch(cluster, name, url)) or answers == set(web), url)


def test_names_of_services_resolve_in_pods_and_names_of_the_outside_are_denied_at_once(cluster: Cluster, web: dict[str, Object]) -> None:
    service = cluster.api.find("Service", "web", "web")
    assert service is not None
    assert fetch(cluster, "web-n2", "http://web.web.svc.cluster.local/hostname") in web
    found = cluster.exec("web", "web-n1", "python3", "-c", LOOK_UP, "web")
    assert json.loads(found.replace("'", '"')) == sorted(service["spec"]["clusterIPs"])
    assert "Name or service not known" in cluster.kubectl(
        *("exec", "-n", "web", "web-n1", "--", "sh", "-c", f"python3 -c '{LOOK_UP}' example.org 2>&1 || true")
    )


def test_pods_reach_the_api_server_at_its_service(cluster: Cluster, web: dict[str, Object]) -> None:
    check = """
import ssl, urllib.request
context = ssl.create_default_context(cafile="/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
print(urllib.request.urlopen("https://kubernetes.default.svc/version", context=context, timeout=5).status)
"""
    assert cluster.exec("web", "web-n1", "python3", "-c", check).strip() == "200"


def test_logs_of_pods_of_every_node_can_be_read(cluster: Cluster, web: dict[str, Object]) -> None:
    for name in web:
        wait_until(lambda name=name: "GET /hostname" in cluster.logs("web", name), f"logs of {name} tell of its probes")


def test_the_network_of_a_pod_can_be_looked_at_from_the_host(cluster: Cluster, web: dict[str, Object]) -> None:
    for pod in web.values():
        interfaces = json.loads(cluster.in_pod(pod, "ip", "-json", "address", "show", "dev", "eth0"))
        found = {entry["local"] for entry in interfaces[0]["addr_info"] if entry["scope"] == "global"}
        assert found == {address["ip"] for address in pod["status"]["podIPs"]}


def test_a_nodes_own_programs_see_only_the_node(cluster: Cluster, web: dict[str, Object]) -> None:
    for node in cluster.nodes:
        assert node.run("hostname").strip() == node.name
        processes = node.run("ps", "-eo", "args")
        assert "kubelet" in processes
        assert "kube-apiserver" not in processes
        kubepods = node.run("ls", "/sys/fs/cgroup/pids/kubepods/besteffort") if node.run("ls", "/sys/fs/cgroup/pids", check=False) else ""
        uids = {pod["metadata"]["uid"] for pod in web.values() if pod["spec"]["nodeName"] != node.name}
        assert not any(uid in kubepods for uid in uids)


def test_a_node_has_no_python(cluster: Cluster) -> None:
    assert cluster.node("n1").run("sh", "-c", "command -v python3 || echo none").strip() == "none"


@pytest.mark.parametrize("program", ["ztunnel-py", "istiod-py", "meshctl"])
def test_the_projects_image_has_its_programs_and_runs_them_as_nobody(cluster: Cluster, program: str) -> None:
    with cluster.namespace(f"image-{program}") as namespace:
        main = container("main", "sh", "-c", f"id -u; {program} --help", image=PROJECT)
        main |= {"securityContext": {"runAsNonRoot": True, "readOnlyRootFilesystem": True}}
        cluster.api.apply(pod(namespace, "main", {"restartPolicy": "Never", "containers": [main]}))

        def ended() -> str:
            found = cluster.api.find("Pod", "main", namespace)
            assert found is not None
            phase: str = found["status"]["phase"]
            return phase if phase in ("Succeeded", "Failed") else ""

        phase = wait_until(ended, f"{program} --help ends")
        output = cluster.logs(namespace, "main")
        assert phase == "Succeeded", output
        assert output.splitlines()[0] == "65532"


def test_an_agents_pod_sees_the_network_namespaces_of_pods_made_after_it(cluster: Cluster) -> None:
    with cluster.namespace("agent") as namespace:
        mounts = [{"name": "netns", "mountPath": "/netns", "mountPropagation": "HostToContainer"}]
        agent = container("agent", "sleep", "infinity") | {"securityContext": {"privileged": True}, "volumeMounts": mounts}
        volumes = [{"name": "netns", "hostPath": {"path": "/var/run/netns"}}]
        node = {"nodeName": "n1", "terminationGracePeriodSeconds": 0}
        cluster.api.apply(pod(namespace, "agent", node | {"hostPID": True, "containers": [agent], "volumes": volumes}))
        cluster.wait_ready(namespace, "agent")
        cluster.api.apply(pod(namespace, "later", node | {"containers": [container("later", "sleep", "infinity")]}))
        (later,) = cluster.wait_ready(namespace, "later")
        wanted = cluster.in_pod(later, "stat", "-Lc", "%i", "/proc/self/ns/net").strip()
        names = cluster.exec(namespace, "agent", "sh", "-c", "stat -c '%i %n' /netns/*").split()
        assert wanted in names, "by name"
        processes = cluster.exec(namespace, "agent", "sh", "-c", f"grep -ls {later['metadata']['uid']} /proc/[0-9]*/cgroup || true").split()
        owners = {cluster.exec(namespace, "agent", "stat", "-Lc", "%i", path.replace("cgroup", "ns/net")).strip() for path in processes}
        assert owners == {wanted}, "by process"


def pod(namespace: str, name: str, spec: Object) -> Object:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def container(name: str, *command: str, image: str = PYTHON) -> Object:
    return {"name": name, "image": image, "imagePullPolicy": "Never", "command": list(command)}


def test_pods_survive_a_killed_kubelet_and_a_killed_containerd(cluster: Cluster, web: dict[str, Object]) -> None:
    before = cluster.programs()
    for name in ("n2/kubelet", "n2/containerd"):
        cluster.signal(name, signal.SIGKILL)
        wait_until(lambda name=name: cluster.programs()[name].starts > before[name].starts, f"{name} is started again")
    assert fetch(cluster, "web-n1", f"http://{web['web-n2']['status']['podIP']}:8080/hostname") == "web-n2"
    wait_until(lambda: fetch_or_none(cluster, "web-n2"), "kubectl exec on n2")
    found = cluster.api.find("Pod", "web-n2", "web")
    assert found is not None
    assert found["metadata"]["uid"] == web["web-n2"]["metadata"]["uid"]
    assert found["status"]["containerStatuses"][0]["restartCount"] == 0


def fetch_or_none(cluster: Cluster, pod: str) -> str:
    return cluster.kubectl("exec", "-n", "web", pod, "--", "hostname", check=False)


def test_what_the_api_server_knew_is_there_when_it_and_etcd_come_back(cluster: Cluster, web: dict[str, Object]) -> None:
    for name in ("kube-apiserver", "etcd"):
        cluster.stop(name)
    with pytest.raises(OSError):  # noqa: PT011  refused, reset or cut off amid the handshake: all mean that nobody is there
        cluster.api.list("Node")
    for name in ("etcd", "kube-apiserver"):
        cluster.start(name)
    wait_until(lambda: all_ready(cluster.api, len(cluster.nodes)), "the cluster is ready again")
    pod = cluster.api.find("Pod", "web-n1", "web")
    assert pod is not None
    assert pod["metadata"]["uid"] == web["web-n1"]["metadata"]["uid"]


def test_a_rebooted_node_starts_its_pods_anew_and_has_its_disk_but_not_its_memory(cluster: Cluster, web: dict[str, Object]) -> None:
    node = cluster.node("n2")
    node.run("touch", "/run/before", "/var/before")  # inode numbers of namespaces tell nothing: the kernel uses them again
    cluster.stop("n2")
    cluster.start("n2")

    def restarted() -> bool:
        pod = cluster.api.find("Pod", "web-n2", "web")
        assert pod is not None
        return pod["status"]["containerStatuses"][0]["restartCount"] > 0 and condition(pod, "Ready")

    wait_until(restarted, "the pod runs again")
    assert node.run("sh", "-c", "ls /run/before /var/before 2>/dev/null || true").split() == ["/var/before"]
    pod = cluster.api.find("Pod", "web-n2", "web")
    assert pod is not None
    assert fetch(cluster, "web-n1", f"http://{pod['status']['podIP']}:8080/hostname") == "web-n2"
