"""The plugin on a node: put there, mended, renewed, and taken away; in a directory that plays the node."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from mesh.kube.api import ApiUnavailable
from mesh.kube.kubeconfig import ClusterAccess
from ztunnel_py.cni import install as module
from ztunnel_py.cni.chain import PLUGIN
from ztunnel_py.cni.install import (
    KUBECONFIG,
    Installation,
    Installer,
    PluginToken,
    request_token,
    write_kubeconfig,
)

PRIMARY = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp"}]}


class Node:
    def __init__(self, path: Path) -> None:
        self.bin, self.net, self.program = path / "bin", path / "net.d", path / "program"
        self.bin.mkdir()
        self.net.mkdir()
        self.program.write_bytes(b"\x7fELF one")
        self.tokens = [PluginToken("first", 1000.0)]
        (path / "ca.crt").write_bytes(b"roots")
        self.access = ClusterAccess("10.96.0.1", 443, ca_file=path / "ca.crt")
        self.installation = Installation(
            self.program, self.bin, self.net, "/etc/cni/net.d", "/run/cni.sock", frozenset({"kube-system"}), "istio-system", "ztunnel"
        )
        self.in_charge = True
        self.installer = Installer(self.installation, self.access, self.fetch_token, lambda: self.in_charge)
        self.write_chain()

    async def fetch_token(self) -> PluginToken:
        await trio.lowlevel.checkpoint()
        if not self.tokens:
            raise ApiUnavailable("no API server")
        return self.tokens.pop(0)

    def write_chain(self) -> None:
        (self.net / "10-pods.conflist").write_text(json.dumps(PRIMARY))

    def chain(self) -> list[str]:
        return [plugin["type"] for plugin in json.loads((self.net / "10-pods.conflist").read_text())["plugins"]]

    def kubeconfig(self) -> dict[str, object]:
        return dict(json.loads((self.net / KUBECONFIG).read_text()))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_program_kubeconfig_and_entry_are_put_in_place_once(node: Node) -> None:
    because, changed = node.installer.mend("first")
    assert (because, changed) == ("", (PLUGIN, KUBECONFIG, "10-pods.conflist"))
    assert (node.bin / PLUGIN).read_bytes() == b"\x7fELF one"
    assert (node.bin / PLUGIN).stat().st_mode & 0o777 == 0o755
    assert (node.net / KUBECONFIG).stat().st_mode & 0o777 == 0o600
    assert node.chain() == ["ptp", PLUGIN]
    entry = json.loads((node.net / "10-pods.conflist").read_text())["plugins"][-1]
    assert entry["kubeconfig"] == f"/etc/cni/net.d/{KUBECONFIG}"
    assert entry["agent"] == {"namespace": "istio-system", "daemonSet": "ztunnel"}
    assert node.installer.mend("first") == ("", ())
    assert sorted(path.name for path in node.net.iterdir()) == ["10-pods.conflist", KUBECONFIG], "nothing temporary is left"


def test_the_kubeconfig_is_one_and_holds_what_works_outside_the_pod(node: Node) -> None:
    found = json.loads(write_kubeconfig(replace(node.access, host="fd00::1"), "first"))
    assert found["clusters"][0]["cluster"] == {
        "server": "https://[fd00::1]:443",
        "certificate-authority-data": base64.b64encode(b"roots").decode(),
    }
    assert found["users"][0]["user"] == {"token": "first"}
    assert found["contexts"][0]["name"] == found["current-context"]


def test_a_new_program_a_renewed_token_and_loose_rights_are_mended(node: Node) -> None:
    node.installer.mend("first")
    node.program.write_bytes(b"\x7fELF two")
    assert node.installer.mend("second") == ("", (PLUGIN, KUBECONFIG))
    assert (node.bin / PLUGIN).read_bytes() == b"\x7fELF two"
    assert "second" in (node.net / KUBECONFIG).read_text()
    os.chmod(node.net / KUBECONFIG, 0o644)
    assert node.installer.mend("second") == ("", (KUBECONFIG,))
    assert (node.net / KUBECONFIG).stat().st_mode & 0o777 == 0o600


def test_two_agents_of_a_roll_out_do_not_undo_each_others_work(node: Node) -> None:
    newer = node.program.with_name("newer")
    newer.write_bytes(b"\x7fELF two")
    in_charge: list[bool] = []
    other = Installer(replace(node.installation, program=newer), node.access, node.fetch_token, lambda: bool(in_charge))
    assert other.mend("its own")[1] == (PLUGIN, KUBECONFIG, "10-pods.conflist"), "where there is nothing, whoever comes first installs"
    node.installer.mend("first")
    assert other.mend("its own") == ("", ())
    assert (node.bin / PLUGIN).read_bytes() == b"\x7fELF one"
    in_charge.append(True)
    assert other.mend("its own") == ("", (PLUGIN, KUBECONFIG))
    node.in_charge = False
    assert node.installer.mend("first") == ("", ())


def test_removal_leaves_the_chain_as_the_others_wrote_it(node: Node) -> None:
    node.installer.mend("first")
    node.installer.remove()
    assert json.loads((node.net / "10-pods.conflist").read_text()) == PRIMARY
    assert [path.name for path in node.net.iterdir()] == ["10-pods.conflist"]
    assert list(node.bin.iterdir()) == []
    node.installer.remove()


def run_installer(node: Node, test: Callable[[Callable[[Callable[[], bool]], object], list[str]], object]) -> None:
    """The installer runs beside the test, which waits by the first argument until something holds; the second is what was reported."""
    said: list[str] = []

    async def until(holds: Callable[[], bool]) -> None:
        for _ in range(3000):
            if holds():
                return
            await trio.sleep(0.01)
        raise AssertionError(f"never, but {said[-1:]}")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.installer.run, said.append)
            await test(until, said)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_chain_that_somebody_rewrites_is_mended_again_and_again(node: Node) -> None:
    async def test(until: Callable[..., object], said: list[str]) -> None:
        for _ in range(3):
            await until(lambda: node.chain() == ["ptp", PLUGIN])
            node.write_chain()
        await until(lambda: node.chain() == ["ptp", PLUGIN])
        (node.bin / PLUGIN).unlink()
        await until(lambda: (node.bin / PLUGIN).exists())
        assert set(said) == {""}

    run_installer(node, test)


def test_a_primary_plugin_that_comes_late_or_in_pieces_is_joined(node: Node) -> None:
    (node.net / "10-pods.conflist").unlink()

    async def test(until: Callable[..., object], said: list[str]) -> None:
        await until(lambda: bool(said) and "there is no configuration" in said[-1])
        (node.net / "10-pods.conflist").write_text(json.dumps(PRIMARY)[:20])
        await until(lambda: "not JSON" in said[-1])
        node.write_chain()
        await until(lambda: said[-1] == "")
        assert node.chain() == ["ptp", PLUGIN]

    run_installer(node, test)


def test_a_directory_that_cannot_be_written_is_told_and_tried_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.bin.rmdir()
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.05)

    async def test(until: Callable[..., object], said: list[str]) -> None:
        await until(lambda: bool(said) and said[-1].startswith("the CNI plugin can't be installed: "))
        assert str(node.bin) in said[-1]
        node.bin.mkdir()
        await until(lambda: said[-1] == "")

    run_installer(node, test)


def test_a_token_is_renewed_at_half_its_life_and_used_as_long_as_it_is_good(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    node.tokens = [PluginToken("first", 0.0), PluginToken("second", 1000.0), PluginToken("too early", 1000.0)]

    async def test(until: Callable[..., object], said: list[str]) -> None:
        await until(lambda: (node.net / KUBECONFIG).exists() and "second" in (node.net / KUBECONFIG).read_text())
        looks = len(said)
        await until(lambda: len(said) > looks + 2)
        assert len(node.tokens) == 1

    run_installer(node, test)


def test_without_a_token_the_plugin_waits_and_with_an_old_one_it_stays(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    node.tokens = []

    async def test(until: Callable[..., object], said: list[str]) -> None:
        await until(lambda: bool(said) and "no token for it: no API server" in said[-1])
        assert node.chain() == ["ptp"]
        node.tokens.append(PluginToken("first", 0.0))
        await until(lambda: said[-1] == "")
        looks = len(said)
        await until(lambda: len(said) > looks + 2)
        assert said[-1] == ""

    run_installer(node, test)


def test_the_token_asked_for_is_the_plugins_own() -> None:
    async def main() -> None:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        client = FakeTokens({"token": "secret", "expirationTimestamp": "2026-01-01T10:00:00Z"})
        assert await request_token(client, "istio-system", "ztunnel-cni", now) == PluginToken("secret", 36000.0)
        assert client.path == "/api/v1/namespaces/istio-system/serviceaccounts/ztunnel-cni/token"
        for status in (
            {},
            {"token": "x"},
            {"token": "", "expirationTimestamp": "2026-01-01T10:00:00Z"},
            {"expirationTimestamp": "x"},
            None,
        ):
            with pytest.raises(ApiUnavailable):
                await request_token(FakeTokens(status), "n", "a", now)

    trio.run(main)


class FakeTokens:
    """An API server that answers TokenRequests."""

    def __init__(self, status: object) -> None:
        self.status = status
        self.path = ""

    async def create(self, path: str, body: object) -> dict[str, object]:
        await trio.lowlevel.checkpoint()
        self.path = path
        return {"status": self.status}
