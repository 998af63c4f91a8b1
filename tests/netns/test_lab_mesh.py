"""The lab with its mesh: what `meshctl lab` says of it, and the demo from end to end."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.testing.lab import Lab, running_lab, wait_until
from meshctl_py.lab.home import LabHome, own_labs

pytestmark = pytest.mark.netns

EXAMPLE = Path(__file__).parents[2] / "examples" / "two-nodes"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(EXAMPLE, tmp_path_factory.mktemp("labmesh")) as lab:
        yield lab


def process(lab: Lab, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in lab.status()["processes"] if item["name"] == name)
    return found


def get(lab: Lab, family: str = "4") -> str:
    return lab.run("shop/client", "python3", "apps/get.py", "http://server/", family).stdout


def test_a_label_captures_pods_and_status_says_why(lab: Lab) -> None:
    done = lab.meshctl("label", "namespace", "shop", "istio.io/dataplane-mode=ambient", "--name", lab.name)
    assert done.stdout == "namespace/shop labeled\n"
    wait_until(lambda: len(lab.pods_in_mesh()) == 4, "the pods of the shop are captured")
    status = lab.meshctl("lab", "status", "--name", lab.name).stdout
    assert re.search(r"^shop +client +n1 +Running +yes +0 +captured +\S+ +namespace label istio.io/dataplane-mode=ambient$", status, re.M)
    assert re.search(r"^outside +caller +n1 +Running +yes +0 +outside +\S+ +neither pod nor namespace is labelled", status, re.M)
    assert get(lab).startswith("200 hello")


def test_the_agent_of_a_node_is_asked_as_on_a_cluster(lab: Lab) -> None:
    lab.label("shop", "istio.io/dataplane-mode=ambient")
    wait_until(lambda: len(lab.pods_in_mesh()) == 4, "the pods of the shop are captured")

    def ask(node: str, what: str, *arguments: str) -> list[dict[str, Any]]:
        done = lab.meshctl("node", node, what, "-o", "json", "--lab", lab.name, *arguments)
        items: list[dict[str, Any]] = json.loads(done.stdout)["items"]
        return items

    pods = ask("n1", "pods", "-n", "shop")
    assert {(pod["name"], pod["phase"], pod["because"]) for pod in pods} == {
        (name, "captured", "namespace label istio.io/dataplane-mode=ambient") for name in ("client", "stranger")
    }
    holder = lab.start("shop/client", "python3", "apps/hold.py", "server", "7000", "4")
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding 4\n"

        def all_held() -> tuple[list[Any], list[Any]] | None:
            # An application may hold a connection a moment before it has come through to the other end.
            outbound = [item["connection"] for item in ask("n1", "connections", "--pod", "shop/client")]
            inbound = [item["connection"] for item in ask("n2", "connections", "--pod", "shop/server")]
            return (outbound, inbound) if len(inbound) == len(outbound) == 4 else None

        outbound, inbound = wait_until(all_held, "both agents tell of the four")
        assert {(living["direction"], living["protocol"], living["destinationWorkload"]) for living in outbound} == {
            ("outbound", "HBONE", "shop/server")
        }
        assert {living["sourceIdentity"] for living in inbound} == {"spiffe://cluster.local/ns/shop/sa/client"}
    finally:
        holder.kill()
        holder.communicate()

    with lab.inside("shop/client") as netns:
        netns.output("nft", "add", "table", "inet", "strangers")
        (rules,) = ask("n1", "rules", "--pod", "client")
        netns.output("nft", "delete", "table", "inet", "strangers")
    assert (rules["differences"], rules["error"], rules["foreignTables"]) == ([], "", ["strangers"])
    assert all(rule["expected"] for chain in rules["chains"] for rule in chain["rules"])
    (certificate,) = ask("n1", "certificates", "--pod", "client")
    assert [part["type"] for part in certificate["chain"]] == ["Leaf", "Root"]
    assert {(item["namespace"], item["name"]) for item in ask("n1", "workloads", "-n", "outside")} == {("outside", "caller")}
    assert "pod.captured" in lab.meshctl("node", "n1", "logs", "--lab", lab.name).stdout


def test_a_pod_that_starts_in_an_enrolled_namespace_is_captured_before_its_first_program_runs(lab: Lab) -> None:
    lab.label("shop", "istio.io/dataplane-mode=ambient")
    container = "{name: a, command: [sh, -c, 'ss -ltn > first-look; sleep infinity']}"
    lab.write("late.yaml", f"apiVersion: v1\nkind: Pod\nmetadata: {{name: late, namespace: shop}}\nspec: {{containers: [{container}]}}\n")
    look = lab.source / "first-look"
    wait_until(lambda: look.exists() and "15008" in look.read_text(), "the agent's ports are there already when the program starts")
    lab.remove("late.yaml")
    wait_until(lambda: "shop/late" not in lab.pods_in_mesh(), "the pod is gone")


def test_what_is_wrong_with_a_policy_is_told_with_file_line_and_field(lab: Lab) -> None:
    policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: odd, namespace: shop}\nspec:\n"
    lab.write("odd.yaml", policy + "  rules:\n    - from:\n        - source: {ipBlocks: [10.0.0.999/8]}\n")

    def find() -> list[dict[str, Any]]:
        return [problem for problem in lab.status()["problems"] if problem["file"] == "odd.yaml"]

    (problem,) = wait_until(find, "the problem is known")
    assert (problem["line"], problem["field"]) == (7, "spec.rules[0].from[0].source.ipBlocks[0]")
    assert "10.0.0.999/8" in problem["message"]
    shown = lab.meshctl("lab", "status", "--name", lab.name).stdout
    assert f"  odd.yaml:7: {problem['field']}: {problem['message']}\n" in shown
    lab.remove("odd.yaml")
    wait_until(lambda: not find(), "the problem is gone")


def test_a_killed_control_plane_is_started_again_and_traffic_does_not_care(lab: Lab) -> None:
    before = process(lab, "istiod")["starts"]
    done = lab.meshctl("lab", "kill", "istiod", "--name", lab.name)
    assert done.stdout == "istiod got SIGKILL (1 process)\n"
    assert get(lab).startswith("200 hello")
    wait_until(lambda: process(lab, "istiod")["starts"] > before, "istiod is started again")
    wait_until(lambda: lab.status()["control_plane"] == "ready", "istiod is ready")
    assert process(lab, "istiod")["last_exit"] == "killed by SIGKILL"


def test_an_agent_that_is_restarted_becomes_ready_and_serves(lab: Lab) -> None:
    before = process(lab, "ztunnel-n1")
    assert lab.meshctl("lab", "restart", "ztunnel-n1", "--name", lab.name).stdout == "ztunnel-n1 restarting\n"
    wait_until(lambda: process(lab, "ztunnel-n1")["starts"] > before["starts"], "the agent is started again")
    wait_until(lambda: lab.status()["nodes"][0]["agent"] == "ready", "the agent is ready")
    wait_until(lambda: get(lab).startswith("200 hello"), "traffic flows")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("restart", "nobody"), "there is no process nobody (there are: istiod, ztunnel-n1, ztunnel-n2, "),
        (("kill", "ztunnel-n1/heart"), "ztunnel-n1 has no part heart"),
        (("kill", "istiod", "-s", "NOSUCH"), "NOSUCH is no signal"),
        (("logs", "nobody"), "there is no log of nobody"),
        (("exec", "nobody", "--", "true"), "there is no pod or node nobody"),
    ],
)
def test_what_does_not_exist_is_told_with_what_does(lab: Lab, arguments: tuple[str, ...], message: str) -> None:
    command, *rest = arguments
    done = lab.meshctl("lab", command, "--name", lab.name, *rest, check=False)
    assert done.returncode != 0
    assert message in done.stderr


def test_logs_follow_a_process_as_it_writes(lab: Lab) -> None:
    command = [sys.executable, "-m", "meshctl_py", "lab", "logs", "--name", lab.name, "-f", "--tail", "0", "server", "-c", "web"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
        try:
            stdout = following.stdout
            assert stdout is not None

            def told() -> bool:
                get(lab)  # again, since whoever follows may not have begun when the first was answered
                return bool(select.select([stdout], [], [], 0)[0])

            wait_until(told, "a line of a request")
            assert "GET / HTTP/1.1" in stdout.readline()
        finally:
            following.kill()


def demo(**options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "meshctl_py.lab.demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def test_every_claim_of_the_demo_holds() -> None:
    running = demo()
    output, _ = running.communicate(timeout=180)
    assert output.splitlines()[-1] == "45 passed, 0 failed", output
    assert running.returncode == 0
    assert not (own_labs() / f"demo-{running.pid}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_lab(number: signal.Signals) -> None:
    running = demo()
    home = LabHome(f"demo-{running.pid}", own_labs() / f"demo-{running.pid}")
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("ok"):
            break
    os.kill(running.pid, number)
    running.communicate(timeout=60)
    wait_until(lambda: not home.alive and not home.path.exists(), "the lab is gone")
