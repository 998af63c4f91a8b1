"""The lab without a mesh: nodes, pods, services and DNS in real namespaces; and that nothing of it stays or touches the host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.testing.lab import wait_until
from meshctl_py.lab.client import Lab, UpOptions, start_lab
from meshctl_py.lab.home import LabError, LabHome, own_labs
from meshctl_py.lab.messages import Failed, Ready
from meshctl_py.lab.status import PodStatus

pytestmark = pytest.mark.netns

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"
GET = str(EXAMPLE / "apps/get.py")

CLUSTER = f"""
apiVersion: v1
kind: Node
metadata: {{name: n1}}
---
apiVersion: v1
kind: Node
metadata: {{name: n2}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: shop}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: shop}}
spec: {{nodeName: n1, containers: [{{name: shell, command: [sleep, infinity]}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: shop, labels: {{app: server}}}}
spec:
  nodeName: n2
  containers:
    - name: web
      command: [python3, {EXAMPLE}/apps/server.py, "8080"]
      ports: [{{name: http, containerPort: 8080}}]
      readinessProbe: {{httpGet: {{port: http, path: /healthz}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: server, namespace: shop}}
spec: {{selector: {{app: server}}, ports: [{{port: 80, targetPort: http}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: headless, namespace: shop}}
spec: {{clusterIP: None, selector: {{app: server}}, ports: [{{port: 80, targetPort: http}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: nobody, namespace: shop}}
spec: {{selector: {{app: nobody}}, ports: [{{port: 80}}]}}
"""


class World:
    """A running lab and the directory it follows."""

    def __init__(self, lab: Lab, source: Path) -> None:
        self.lab = lab
        self.source = source

    def run(self, target: str, *command: str, namespace: str | None = None) -> subprocess.CompletedProcess[str]:
        process = self.lab.open_command(target, command, namespace=namespace).start(
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = process.communicate(timeout=30)
        return subprocess.CompletedProcess(command, process.returncode, output)

    def get(self, target: str, url: str, family: str = "4") -> str:
        return self.run(target, "python3", GET, url, family).stdout.strip()

    def write(self, name: str, text: str) -> None:
        draft = self.source / f".{name}"
        draft.write_text(text)
        draft.rename(self.source / name)

    def pod(self, name: str) -> PodStatus | None:
        return next((pod for pod in self.lab.status().pods if pod.name == name), None)

    def ready_pod(self, name: str) -> PodStatus:
        def find() -> PodStatus | None:
            found = self.pod(name)
            return found if found is not None and found.ready else None

        found = wait_until(find, f"pod {name} ready")
        assert found is not None
        return found


@contextmanager
def running(source: Path, suffix: str) -> Iterator[World]:
    with start_lab(source, f"test-{os.getpid()}-{suffix}", UpOptions(with_mesh=False, tied=True, patience=30)) as starting:
        *_, outcome = starting
        assert isinstance(outcome, Ready), outcome
        yield World(Lab(starting.home), source)
        keeper = (starting.home.logs / "keeper.log").read_text()
        assert "Traceback" not in keeper, keeper


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    source = tmp_path_factory.mktemp("cluster")
    (source / "cluster.yaml").write_text(CLUSTER)
    with running(source, "world") as world:
        yield world


@pytest.mark.parametrize("family", ["4", "6"])
@pytest.mark.parametrize("name", ["server", "server.shop", "server.shop.svc", "server.shop.svc.cluster.local", "headless:8080"])
def test_a_pod_reaches_a_service_by_name_and_is_seen_with_its_own_address(world: World, name: str, family: str) -> None:
    client = world.pod("client")
    assert client is not None
    assert world.get("client", f"http://{name}/x", family) == f"200 hello {client.ips[0 if family == '4' else 1]}, you asked for /x"


@pytest.mark.parametrize("family", ["4", "6"])
def test_a_node_reaches_a_service_too(world: World, family: str) -> None:
    node = world.lab.status().nodes[0]
    assert world.get("n1", "http://server.shop/", family) == f"200 hello {node.ips[0 if family == '4' else 1]}, you asked for /"


@pytest.mark.parametrize("family", ["4", "6"])
def test_a_pod_reaches_itself_through_its_service(world: World, family: str) -> None:
    assert world.get("server", "http://server.shop/", family).startswith("200 hello")  # ``server`` is its own host name


@pytest.mark.parametrize("family", ["4", "6"])
@pytest.mark.parametrize("where", ["client", "n1"])
def test_a_service_that_nobody_stands_behind_refuses_at_once(world: World, where: str, family: str) -> None:
    assert "ConnectionRefusedError" in world.get(where, "http://nobody.shop/", family)


def test_a_name_that_is_no_service_does_not_exist(world: World) -> None:
    assert "gaierror: [Errno -2]" in world.get("client", "http://somebody/")


def test_exec_gives_the_commands_status_output_directory_and_hostname(world: World) -> None:
    done = world.run("client", "sh", "-c", "hostname; pwd; cat /etc/hosts; exit 7")
    assert done.returncode == 7
    client = world.pod("client")
    assert client is not None
    assert done.stdout.startswith(f"client\n{world.source}\n")
    assert f"{client.ips[0]}\tclient\n" in done.stdout
    assert world.run("client", "no-such-command").returncode == 127


def test_exec_dies_of_signals_as_the_command_does(world: World) -> None:
    assert world.run("client", "sh", "-c", "kill -TERM $$").returncode == 128 + signal.SIGTERM
    process = world.lab.open_command("client", ["sh", "-c", "echo started; exec sleep infinity"]).start(stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM


def test_exec_reaches_the_router_and_says_what_there_is_where_there_is_not(world: World) -> None:
    assert "to-n1" in world.run("router", "ip", "-br", "link").stdout
    with pytest.raises(LabError, match=r"there is no pod or node nobody \(there are: router, n1, n2, shop/client, shop/server\)"):
        world.run("nobody", "true")


def test_a_process_cannot_see_the_namespaces_of_others(world: World) -> None:
    assert world.run("client", "ls", str(world.lab.home.netns)).stdout == ""


def test_a_process_that_ends_is_started_again_and_its_service_knows(world: World) -> None:
    before = next(process for process in world.lab.status().processes if process.name == "shop/server/web")
    world.lab.signal("shop/server/web", signal.SIGKILL)

    def restarted() -> bool:
        now = next(process for process in world.lab.status().processes if process.name == "shop/server/web")
        return now.starts == before.starts + 1 and now.last_exit == "killed by SIGKILL"

    wait_until(restarted, "another start")
    world.ready_pod("server")
    wait_until(lambda: world.get("client", "http://server/").startswith("200"), "the service works again")


def test_a_container_that_ends_again_and_again_is_not_ready_in_between(world: World) -> None:
    head = "apiVersion: v1\nkind: Pod\nmetadata: {name: failing, namespace: shop}\n"
    world.write("failing.yaml", head + 'spec: {nodeName: n1, containers: [{name: a, command: [sh, -c, "sleep 0.3; exit 3"]}]}\n')
    seen: list[PodStatus] = []

    def look() -> bool:
        found = world.pod("failing")
        seen.extend([found] if found is not None and found.restarts else [])
        return found is not None and found.restarts >= 3

    wait_until(look, "three starts after the first")
    assert [pod for pod in seen if pod.ready] == []
    assert {pod.because.partition(";")[0] for pod in seen} == {"a: exit status 3"}
    (world.source / "failing.yaml").unlink()
    wait_until(lambda: world.pod("failing") is None, "the pod is gone")


def test_a_pod_that_is_added_changed_and_removed_while_the_lab_runs_is_followed(world: World) -> None:
    pod = """
apiVersion: v1
kind: Pod
metadata: {name: extra, namespace: shop, labels: {app: extra}}
spec:
  nodeName: n1
  initContainers:
    - {name: first, command: [sh, -c, "echo first > $MARK"], env: [{name: MARK, value: MARKFILE}]}
    - {name: second, command: [sh, -c, "echo second >> $MARK"], env: [{name: MARK, value: MARKFILE}]}
  containers:
    - name: web
      command: [sh, -c, "echo main $ME $IP >> $MARK; exec python3 SERVER 8080"]
      env:
        - {name: MARK, value: MARKFILE}
        - {name: ME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
---
apiVersion: v1
kind: Service
metadata: {name: extra, namespace: shop}
spec: {selector: {app: extra}, ports: [{port: 80, targetPort: 8080}]}
"""
    mark = world.source / "mark"
    pod = pod.replace("MARKFILE", str(mark)).replace("SERVER", str(EXAMPLE / "apps/server.py"))
    world.write("extra.yaml", pod)
    added = world.ready_pod("extra")
    wait_until(lambda: world.get("client", "http://extra/").startswith("200"), "the new service works")
    assert mark.read_text() == f"first\nsecond\nmain extra {added.ips[0]}\n"

    world.write("extra.yaml", pod.replace("app: extra}}", "app: other}}"))
    wait_until(lambda: "ConnectionRefusedError" in world.get("client", "http://extra/"), "a pod with another label is no endpoint")
    relabelled = world.pod("extra")
    assert relabelled is not None
    assert relabelled.uid == added.uid

    world.write("extra.yaml", pod.replace('8080"]', '8081"]'))
    wait_until(lambda: (found := world.pod("extra")) is not None and found.ready and found.uid != added.uid, "a new pod")
    assert "8081" in world.run("extra", "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout

    (world.source / "extra.yaml").unlink()
    wait_until(lambda: world.pod("extra") is None, "the pod is gone")
    wait_until(lambda: "gaierror" in world.get("client", "http://extra/"), "and its service's name")
    assert "extra" not in world.run("n1", "ip", "-br", "link").stdout


def test_a_node_that_is_added_and_removed_while_the_lab_runs_is_followed(world: World) -> None:
    node = "apiVersion: v1\nkind: Node\nmetadata: {name: n3}\n---\n"
    head = "apiVersion: v1\nkind: Pod\nmetadata: {name: far, namespace: shop}\n"
    pod = head + "spec: {nodeName: n3, containers: [{name: a, command: [sleep, infinity]}]}\n"
    world.write("node.yaml", node + pod)
    far = world.ready_pod("far")
    assert world.get("far", "http://server/") == f"200 hello {far.ips[0]}, you asked for /"
    world.write("node.yaml", pod)
    wait_until(
        lambda: any(
            (problem.field, problem.message) == ("spec.nodeName", "there is no node n3 (known: n1, n2)")
            for problem in world.lab.status().problems
        ),
        "the pod has lost its node",
    )
    assert [node.name for node in world.lab.status().nodes] == ["n1", "n2"]
    (world.source / "node.yaml").unlink()
    wait_until(lambda: not world.lab.status().problems, "nothing is wrong any more")


def test_mistakes_in_the_source_are_told_with_file_and_line_and_the_last_good_version_stays(world: World) -> None:
    world.write("cluster.yaml", CLUSTER.replace("{port: 80, targetPort: http}", "{port: eighty, targetPort: http}", 1))
    (problem,) = wait_until(lambda: world.lab.status().problems, "a problem")
    assert (problem.file, problem.line, problem.field) == ("cluster.yaml", 33, "spec.ports[0].port")
    assert world.get("client", "http://server/").startswith("200")
    world.write("cluster.yaml", CLUSTER)
    wait_until(lambda: not world.lab.status().problems, "the problem is gone")


def test_two_labs_with_the_same_addresses_live_side_by_side(world: World) -> None:
    with running(world.source, "other") as other:
        assert other.get("client", "http://server/") == world.get("client", "http://server/")
        other.lab.signal("shop/server/web", signal.SIGSTOP)
        assert world.get("client", "http://server/").startswith("200")
    assert world.get("client", "http://server/").startswith("200")


# --- nothing stays, nothing of the host is touched


def host_view() -> dict[str, str]:
    """What a lab could leave behind or change on the host."""
    commands = {
        "links": ["ip", "-o", "link"],
        "addresses": ["ip", "-o", "addr"],
        "routes": ["ip", "route", "show", "table", "all"],
        "rules": ["nft", "list", "ruleset"],
        "named namespaces": ["ip", "netns", "list"],
    }
    seen = {name: subprocess.run(command, capture_output=True, text=True, check=True).stdout for name, command in commands.items()}
    seen["addresses"] = "\n".join(line.split("valid_lft")[0] for line in seen["addresses"].splitlines())
    sysctls = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter", "net/ipv6/conf/default/accept_dad")
    return seen | {name: Path("/proc/sys", name).read_text() for name in sysctls} | {"hostname": os.uname().nodename}


def processes_of(home: LabHome) -> list[int]:
    """Processes that name the lab's directory or have files of it open."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                known = (entry / "cmdline").read_bytes() + b"".join(os.readlink(link).encode() for link in (entry / "fd").iterdir())
            except OSError:
                continue
            if str(home.path).encode() in known:
                found.append(int(entry.name))
    return found


def assert_nothing_is_left(home: LabHome) -> None:
    wait_until(lambda: not home.alive and not processes_of(home), "no process of the lab is left")
    wait_until(lambda: not home.path.exists(), "its files are gone")
    assert str(home.path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="the host's rules are shown to root only")
def test_a_lab_touches_nothing_of_the_host_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    before = host_view()
    with running(tmp_path, "host") as world:
        assert world.get("client", "http://server/").startswith("200")
        during = host_view()
        home = world.lab.home
    assert during == before
    assert host_view() == before
    assert_nothing_is_left(home)


def meshctl(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "meshctl_py", "lab", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.fixture
def never_ready(tmp_path: Path) -> Path:
    """A cluster that comes up but for one pod."""
    container = "{name: a, command: [sh, -c, 'echo my last words; sleep infinity'], readinessProbe: {tcpSocket: {port: 1}}}"
    pod = f"apiVersion: v1\nkind: Pod\nmetadata: {{name: slow}}\nspec: {{containers: [{container}]}}\n"
    (tmp_path / "cluster.yaml").write_text("apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n---\n" + pod)
    return tmp_path


def wait_for_pod(home: LabHome) -> None:
    """Until the lab that is on its way up has started the pod's process."""
    wait_until(lambda: any(home.logs.glob("default_slow_a.log")) and processes_of(home), "the pod runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_up_removes_everything(never_ready: Path, number: signal.Signals) -> None:
    name = f"test-{os.getpid()}-{number.name.lower()}"
    home = LabHome(name, own_labs() / name)
    up = meshctl("up", str(never_ready), "--name", name)
    wait_for_pod(home)
    up.send_signal(number)
    output, _ = up.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert up.returncode == 130
        assert "interrupted: removing everything" in output
    assert_nothing_is_left(home)


def test_up_tells_what_is_not_ready_in_time_with_the_end_of_its_log_and_removes_everything(never_ready: Path) -> None:
    name = f"test-{os.getpid()}-slow"
    up = meshctl("up", str(never_ready), "--name", name, "--timeout", "4")
    output, _ = up.communicate(timeout=60)
    assert up.returncode == 1
    assert "not ready within 4 s" in output
    assert "pod default/slow: " in output
    assert "default_slow_a.log: my last words" in output
    assert_nothing_is_left(LabHome(name, own_labs() / name))


@pytest.mark.parametrize("victim", ["meshctl_py.lab.keeper", "meshctl_py.lab.init"])
def test_a_killed_keeper_takes_the_lab_along_and_down_removes_its_files(tmp_path: Path, victim: str) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    name = f"test-{os.getpid()}-killed"
    home = LabHome(name, own_labs() / name)
    with start_lab(tmp_path, name, UpOptions(with_mesh=False)) as starting:
        assert isinstance([*starting][-1], Ready)
    assert home.alive
    # All are looked at before one is killed: the others go with it.
    victims = [pid for pid in processes_of(home) if victim.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not home.alive and not processes_of(home), "no process is left")
    listing, _ = meshctl("list").communicate(timeout=30)
    assert f"{name}" in listing
    assert "killed" in listing
    output, _ = meshctl("down", "--name", name).communicate(timeout=30)
    assert output == f"lab {name}: files of a killed lab removed\n"
    assert_nothing_is_left(home)


def test_down_ends_a_lab_whose_keeper_is_stuck(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n")
    name = f"test-{os.getpid()}-stuck"
    home = LabHome(name, own_labs() / name)
    with start_lab(tmp_path, name, UpOptions(with_mesh=False)) as starting:
        assert isinstance([*starting][-1], Ready)
    for pid in processes_of(home):
        if b"meshctl_py.lab.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    output, _ = meshctl("down", "--name", name).communicate(timeout=60)
    assert output == f"lab {name} is gone\n"
    assert_nothing_is_left(home)


@pytest.mark.parametrize(
    ("text", "because"),
    [
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n", "has no Node object: a lab needs at least one"),
        ("apiVersion: v1\nkind: Node\nmetadata: [", "cluster.yaml:3"),
    ],
)
def test_a_directory_that_makes_no_cluster_is_refused(tmp_path: Path, text: str, because: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with start_lab(tmp_path, f"test-{os.getpid()}-none", UpOptions(with_mesh=False)) as starting:
        *_, outcome = starting
        assert isinstance(outcome, Failed)
        assert because in outcome.because
    assert_nothing_is_left(starting.home)


def test_a_lab_ends_with_its_foreground_command(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("apiVersion: v1\nkind: Node\nmetadata: {name: n1}\n")
    name = f"test-{os.getpid()}-fore"
    home = LabHome(name, own_labs() / name)
    up = meshctl("up", str(tmp_path), "--name", name, "--foreground")
    wait_until(lambda: home.alive and home.control.exists(), "the lab runs")
    up.send_signal(signal.SIGINT)
    assert up.wait(30) == 130
    assert_nothing_is_left(home)


# --- without root


def run_as_nobody(body: Callable[[], int]) -> int:
    """The result of a function in a child without any rights, even where the interpreter lies in a directory only root may enter."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            signal.alarm(90)
            _open_the_way_to(Path(sys.base_prefix))
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            status = body()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _open_the_way_to(prefix: Path) -> None:
    from meshctl_py.lab import kernel

    closed = next((parent for parent in reversed(prefix.parents) if not parent.stat().st_mode & 0o001), None)
    if closed is None:
        return
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount(str(prefix), "/mnt", flags=kernel.MS_BIND)
    kernel.mount("tmpfs", str(closed), "tmpfs", options="mode=755")
    prefix.mkdir(parents=True)
    kernel.mount("/mnt", str(prefix), flags=kernel.MS_BIND)


def test_a_lab_works_without_root() -> None:
    cache = Path(f"/tmp/test-{os.getpid()}-nobody")  # not in tmp_path, which only root may enter
    source = cache / "source"
    source.mkdir(parents=True)
    (source / "cluster.yaml").write_text(CLUSTER)
    os.chown(cache, 65534, 65534)
    result = cache / "result"

    def body() -> int:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        os.environ.pop("XDG_RUNTIME_DIR", None)
        with running(source, "nobody") as world:
            answers = [world.get("client", "http://server/", family) for family in ("4", "6")]
            client = world.pod("client")
            assert client is not None
            result.write_text(repr((answers, client.ips)))
            assert answers == [f"200 hello {ip}, you asked for /" for ip in client.ips]
        assert not world.lab.home.path.exists()
        return 0

    try:
        assert run_as_nobody(body) == 0, result.read_text() if result.exists() else "no lab came up"
    finally:
        subprocess.run(["rm", "-rf", str(cache)], check=True)
