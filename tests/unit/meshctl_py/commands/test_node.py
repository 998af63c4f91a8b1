"""``meshctl node`` shows what an agent says, however it is reached, and says why it can't be."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import trio
from click.testing import CliRunner
from ruamel.yaml import YAML

from mesh.runtime import inspection
from mesh.runtime.http import Request, Response, Route, serve_admin, unix_listener
from meshctl_py.__main__ import main
from meshctl_py.commands import node as module
from tests.unit.meshctl_py.conftest import Cluster, status_page

LIVING = inspection.LivingConnection(
    *("uid", "inbound", "HBONE", "10.0.0.9:40000", "10.0.0.1:80"),
    service="web.shop.svc.cluster.local",
    source_workload="shop/client",
    source_identity="spiffe://cluster.local/ns/shop/sa/client",
    sent=2048,
    received=100,
    age=75.5,
    policy="shop/only",
    rule=0,
    because="allowed by policy shop/only",
)
PAGES: dict[str, inspection.Page] = {
    "status": status_page("n1"),
    "pods": inspection.PodsPage(
        [inspection.PodPage("uid", "shop", "web", "spiffe://x", "captured", "namespace label", ["10.0.0.1"], inbound=1)], omitted=3
    ),
    "connections": inspection.ConnectionsPage([inspection.NamedConnection("shop", "web", LIVING)]),
    "certificates": inspection.CertificatesPage(
        [
            inspection.CertificatePage("spiffe://a", "Unavailable", "no route to the authority"),
            inspection.CertificatePage(
                "spiffe://b", "Available", renewal=1.8e9, chain=[inspection.CertificatePart("Leaf", "", "CN=root", "ff", 0.0, 4e9)]
            ),
        ]
    ),
    "policies": inspection.ObjectsPage(
        [{"name": "only", "namespace": "shop", "action": "Allow", "scope": "Namespace", "rules": [[]], "unreadable": "rules[0]: no"}]
    ),
    "workloads": inspection.ObjectsPage([]),
    "rules": inspection.AllRulesPage(
        [
            inspection.RulesPage(
                *("uid", "shop", "web", "captured"),
                differences=["a rule is missing"],
                chains=[
                    inspection.ChainPage("nat", "output", [inspection.RulePage("redirect", True, 3, 180), inspection.RulePage("x", False)])
                ],
                foreign_tables=["theirs"],
            )
        ]
    ),
}


@pytest.fixture
def mesh(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    monkeypatch.setattr(module, "LOCAL_SOCKET", tmp_path / "no.sock")
    cluster.add_mesh("n1")
    cluster.serve("ztunnel-n1", 15000, PAGES)
    return cluster


def rows(output: str) -> list[list[str]]:
    return [[cell for cell in line.split("  ") if cell.strip()] for line in output.splitlines()]


def test_connections_are_shown_with_who_and_why(mesh: Cluster) -> None:
    result = mesh.run("node", "n1", "connections")
    assert result.exit_code == 0, result.output
    cells = [cell.strip() for cell in rows(result.output)[1]]
    assert cells == [
        *("shop/web", "inbound", "shop/client (10.0.0.9:40000)", "web.shop.svc.cluster.local"),
        *("spiffe://cluster.local/ns/shop/sa/client", "2Ki", "100", "1m15s", "allowed by policy shop/only"),
    ]


def test_what_is_left_out_is_counted_and_the_filters_reach_the_agent(mesh: Cluster) -> None:
    result = mesh.run("node", "n1", "pods", "--pod", "web", "-n", "shop", "--limit", "1")
    assert "... and 3 more" in result.output
    assert mesh.asked[-1] == "/debug/pods?limit=1&pod=web&namespace=shop"


def test_each_view_says_what_needs_attention(mesh: Cluster) -> None:
    assert "no route to the authority" in mesh.run("node", "n1", "certificates").output
    assert "denies: unreadable: rules[0]: no" in mesh.run("node", "n1", "policies").output
    rules = mesh.run("node", "n1", "rules").output
    for text in ("not as they should be", "a rule is missing", "3 packets 180", "not ours: x", "tables of others: theirs"):
        assert text in rules
    assert mesh.run("node", "n1", "workloads").output == "no workloads on node n1\n"
    assert mesh.run("node", "n1", "workloads", "--pod", "shop/web").output == "no workloads of pod shop/web on node n1\n"


def test_json_and_yaml_are_what_the_agent_said(mesh: Cluster) -> None:
    told = json.loads(mesh.run("node", "n1", "connections", "-o", "json").output)
    assert told["items"][0]["connection"]["sourceIdentity"] == LIVING.source_identity
    assert YAML(typ="safe").load(mesh.run("node", "n1", "connections", "-o", "yaml").output) == told


def test_logs_come_from_the_api_server_of_all_containers_by_time(mesh: Cluster) -> None:
    pod = mesh.server.find("Pod", "istio-system", "ztunnel-n1")
    assert pod is not None
    pod["status"]["containerStatuses"] = [{"name": "mover"}, {"name": "ztunnel"}]
    mesh.server.put(pod)
    mesh.server.logs["istio-system", "ztunnel-n1", "ztunnel"] = "1\tone\n3\tthree\n"
    mesh.server.logs["istio-system", "ztunnel-n1", "mover"] = "2\ttwo\n4\tfour\n"
    assert mesh.run("node", "n1", "logs").output == "1\tone\n2\ttwo\n3\tthree\n4\tfour\n"
    assert mesh.run("node", "n1", "logs", "--tail", "1").output == "4\tfour\n"
    assert sorted(mesh.run("node", "n1", "logs", "-f").output.splitlines()) == ["1\tone", "2\ttwo", "3\tthree", "4\tfour"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("n2", "pods"), "there is no node n2 (there are: n1, n3)"),
        (("n3", "pods"), "no agent runs on node n3: 'meshctl status'"),
        (("n1", "services"), "it has no such page: it is of another version, or not ours"),
        (("n1", "pods", "-w"), "-w goes with connections"),
        (("n1", "pods", "-f"), "-f and --tail go with logs"),
        (("n1", "things"), "Invalid value for 'WHAT': 'things' is not one of 'pods', 'connections',"),
    ],
)
def test_questions_without_an_answer_say_why(mesh: Cluster, arguments: tuple[str, ...], message: str) -> None:
    mesh.server.put({"kind": "Node", "metadata": {"name": "n3"}})
    result = mesh.run("node", *arguments)
    assert (result.exit_code != 0, message in result.output) == (True, True), result.output


def test_an_agent_that_refuses_the_port_is_named_with_the_kubelets_words(mesh: Cluster) -> None:
    del mesh.server.ports["istio-system", "ztunnel-n1", 15000]
    result = mesh.run("node", "n1", "pods")
    assert "the agent on node n1 (pod ztunnel-n1) can't be asked: error forwarding port 15000" in result.output


def test_on_the_node_itself_the_socket_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "admin.sock"
    monkeypatch.setattr(module, "LOCAL_SOCKET", path)

    async def page(request: Request) -> Response:
        return Response(200, msgspec.json.encode(PAGES[request.path.removeprefix("/debug/")]), "application/json")

    async def check() -> None:
        with unix_listener(path) as listener:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_admin, {f"/debug/{name}": Route(page) for name in PAGES}, [listener])
                for arguments in (["node", "n1", "pods"], ["node", "other", "pods", "--socket", str(path)]):
                    result = await trio.to_thread.run_sync(CliRunner().invoke, main, arguments)
                    assert (result.exit_code, "captured" in result.output) == (0, True), result.output
                nursery.cancel_scope.cancel()

    trio.run(check)
