"""Plugin and agent talk to each other: the agent's answers, and what the real plugin makes of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from mesh.model.address import parse_ip
from mesh.runtime.http import Request, serve_admin, unix_listener
from ztunnel_py.brain.cni import cni_routes
from ztunnel_py.brain.pods import CannotServe, NotYet
from ztunnel_py.cni.request import PodAdded

SOURCE = Path(__file__).parents[4] / "deploy" / "cni"
RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}], "extra": [1]}


class FakeKeeper:
    """Answers as the test says."""

    def __init__(self) -> None:
        self.asked: list[PodAdded] = []
        self.answer: str | Exception = "captured"

    async def hold(self, added: PodAdded) -> str:
        await trio.lowlevel.checkpoint()
        self.asked.append(added)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def body(**change: object) -> bytes:
    return json.dumps({"Netns": "/var/run/netns/x", "PodName": "web", "PodNamespace": "shop", "IPs": [], **change}).encode()


@pytest.mark.parametrize(
    ("answer", "status"),
    [("captured: label", 200), (NotYet("not read yet"), 503), (CannotServe("no rules"), 500)],
)
def test_the_status_says_whether_the_pod_may_start_and_the_body_why(answer: str | Exception, status: int) -> None:
    keeper = FakeKeeper()
    keeper.answer = answer

    async def ask() -> None:
        route = cni_routes(keeper)["/cmdadd"]
        assert route.methods == {"POST"}
        response = await route.handler(Request("POST", "/cmdadd", {}, {}, body()))
        assert (response.status, response.body.decode()) == (status, f"{answer}\n")

    trio.run(ask)
    assert keeper.asked == [PodAdded("shop", "web", "", "/var/run/netns/x", ())]


def test_a_request_that_is_none_is_told_its_field() -> None:
    async def ask() -> None:
        handler = cni_routes(FakeKeeper())["/cmdadd"].handler
        response = await handler(Request("POST", "/cmdadd", {}, {}, body(Netns="x")))
        assert response.status == 400
        assert b"Netns" in response.body

    trio.run(ask)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("there is no Go to build the CNI plugin with")
    target = tmp_path_factory.mktemp("plugin") / "ambient-mesh-cni"
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    subprocess.run(["go", "build", "-o", str(target), "."], cwd=SOURCE, env=environment, check=True, timeout=250)
    return target


def with_agent(tmp_path: Path, keeper: FakeKeeper, test: Callable[[Path], Awaitable[None]]) -> None:
    async def main() -> None:
        socket = tmp_path / "cni.sock"
        with unix_listener(socket) as listener:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_admin, cni_routes(keeper), [listener])
                await test(socket)
                nursery.cancel_scope.cancel()

    trio.run(main)


async def add_pod(plugin: Path, socket: Path) -> tuple[int, object]:
    """The plugin's exit status, and what it printed."""
    config = {"cniVersion": "1.0.0", "type": "ambient-mesh-cni", "socket": str(socket), "kubeconfig": "/nonexistent", "prevResult": RESULT}
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_NETNS": "/var/run/netns/x",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=uid-1",
    }
    done = await trio.run_process([str(plugin)], stdin=json.dumps(config).encode(), capture_stdout=True, check=False, env=environment)
    return done.returncode, json.loads(done.stdout)


def test_the_plugin_lets_a_pod_pass_that_the_agent_lets_pass(plugin: Path, tmp_path: Path) -> None:
    keeper = FakeKeeper()

    async def test(socket: Path) -> None:
        assert await add_pod(plugin, socket) == (0, RESULT)

    with_agent(tmp_path, keeper, test)
    assert keeper.asked == [PodAdded("shop", "web", "uid-1", "/var/run/netns/x", (parse_ip("10.1.2.3"),))]


def test_the_plugin_hands_the_agents_reason_to_the_container_runtime(plugin: Path, tmp_path: Path) -> None:
    keeper = FakeKeeper()
    keeper.answer = CannotServe("the pod is not captured after 20 s: no rules")

    async def test(socket: Path) -> None:
        status, told = await add_pod(plugin, socket)
        assert status == 1
        reason = "ambient mesh: the node's agent says: the pod is not captured after 20 s: no rules"
        assert told == {"cniVersion": "1.0.0", "code": 11, "msg": reason}

    with_agent(tmp_path, keeper, test)
