"""A directory of YAML: what is wrong is told, the rest goes on, the last good version stays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import cast

import pytest
import trio

from mesh.kube import directory as directory_module
from mesh.kube.directory import Changes, DirectoryStore, remove_overlay, write_overlay
from mesh.kube.objects import ObjectKey

NAMESPACE = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {a: b}}\n"
POD = """\
apiVersion: v1
kind: Pod
metadata:
  name: NAME
  namespace: shop
  labels:
    app: web
spec:
  containers:
  - name: main
    command: [sleep, inf]
"""
POLICY = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: allow, namespace: shop}
spec:
  rules:
  - from:
    - source: {principals: [cluster.local/ns/shop/sa/a]}
"""


def pod(name: str) -> str:
    return POD.replace("NAME", name)


def documents(*parts: str) -> str:
    return "---\n".join(parts)


class World:
    """A user's directory, one overlay, and a store on both."""

    def __init__(self, tmp_path: Path) -> None:
        self.source = tmp_path / "source"
        self.overlay = tmp_path / "overlay"
        self.source.mkdir()
        self.overlay.mkdir()
        self.store = DirectoryStore([self.source, self.overlay])

    def write(self, name: str, *parts: str) -> Changes:
        (self.source / name).parent.mkdir(parents=True, exist_ok=True)
        (self.source / name).write_text(documents(*parts))
        return self.store.load()

    def remove(self, name: str) -> Changes:
        (self.source / name).unlink()
        return self.store.load()

    @property
    def names(self) -> set[str]:
        return {str(obj.key) for obj in self.store.objects()}

    @property
    def problems(self) -> list[str]:
        return [str(problem) for problem in self.store.problems]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_objects_come_from_all_files_and_documents(world: World) -> None:
    world.write("a.yaml", NAMESPACE, "# nothing\n", pod("one"))
    world.write("deep/er/b.yml", pod("two"))
    (world.source / ".hidden.yaml").write_text(pod("three"))
    (world.source / ".git").mkdir()
    (world.source / ".git" / "x.yaml").write_text(pod("four"))
    (world.source / "readme.md").write_text("not: [yaml")
    world.store.load()
    assert world.names == {"Namespace shop", "Pod shop/one", "Pod shop/two"}
    assert world.problems == []
    one = world.store.find("Pod", "shop", "one")
    assert one is not None
    assert (one.origin.file, one.origin.document, one.line, dict(one.labels)) == ("a.yaml", 1, 7, {"app": "web"})


def test_a_list_is_its_items(world: World) -> None:
    items = "\n".join("- " + text.replace("\n", "\n  ").rstrip() for text in (NAMESPACE, pod("one")))
    world.write("a.yaml", f"apiVersion: v1\nkind: List\nitems:\n{items}\n")
    assert world.names == {"Namespace shop", "Pod shop/one"}
    assert world.store.objects("Pod")[0].line == 7


def test_a_wrong_type_is_told_with_file_line_and_field(world: World) -> None:
    world.write("shop.yaml", NAMESPACE, pod("one").replace("[sleep, inf]", "sleep inf"))
    assert world.problems == ["shop.yaml:15: spec.containers[0].command: expected a list, found a string"]


@pytest.mark.parametrize(("text", "problem"), [
    (pod("one").replace("name: main", "image: x"), "a.yaml:14: spec.containers[0]: 'name' is required"),
    (pod("one").replace("containers", "container"), "a.yaml:12: spec: 'containers' is required"),
    (pod("one").replace("app: web", "app: 1"), "a.yaml:11: metadata.labels.app: expected a string, found a number (1); put it in quotes"),
    (pod("one").replace("app: web", "app: on"),
     "a.yaml:11: metadata.labels.app: expected a string, found a boolean (true); put it in quotes"),
    (pod("o/../ne"), "a.yaml:8: metadata.name: 'o/../ne' is no name for an object: lower case letters, digits, '-' and '.' only"),
    (pod("one").replace("  name: one\n", ""), "a.yaml:7: metadata: 'name' is required"),
    ("- a\n", "a.yaml:5: expected an object (a mapping), found a list"),
    ("kind: Pod\nmetadata: {name: x}\n", "a.yaml:5: 'apiVersion' is required"),
    (pod("one") + "status: {podIP: 10.0.0.300}\n", "a.yaml:16: status.podIP: not an IP address: '10.0.0.300'"),
    (pod("one") + "    ports: [{containerPort: 70000}]\n",
     "a.yaml:16: spec.containers[0].ports[0].containerPort: expected a number from 1 to 65535, found 70000"),
    ("apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\nspec: {ports: [{port: '80'}]}\n",
     "a.yaml:8: spec.ports[0].port: expected a whole number, found a string"),
])  # fmt: skip
def test_mistakes_have_their_place(world: World, text: str, problem: str) -> None:
    world.write("a.yaml", NAMESPACE, text)
    assert world.problems == [problem]
    assert world.names == {"Namespace shop"}


def test_a_malformed_file_is_told_with_line_and_column_and_its_objects_stay(world: World) -> None:
    world.write("a.yaml", NAMESPACE, pod("one"), pod("two"))
    changes = world.write("a.yaml", NAMESPACE, pod("one").replace("[sleep, inf]", "[sleep, inf"), pod("two").replace("web", "new"))
    assert [problem.split(": ")[:2] for problem in world.problems] == [["a.yaml:16", "column 1"]]
    assert world.names == {"Namespace shop", "Pod shop/one", "Pod shop/two"}
    assert {str(key) for key in changes.changed} == {"Pod shop/two"}
    world.write("a.yaml", NAMESPACE, pod("one"), pod("two"))
    assert world.problems == []


def test_what_leaves_a_malformed_file_is_removed_only_once_it_can_be_read(world: World) -> None:
    world.write("a.yaml", NAMESPACE, pod("one"))
    world.write("a.yaml", NAMESPACE, "kind: [")
    assert world.names == {"Namespace shop", "Pod shop/one"}
    world.write("a.yaml", NAMESPACE)
    assert world.names == {"Namespace shop"}


def test_a_bad_object_keeps_its_last_good_version_and_no_other_does(world: World) -> None:
    world.write("a.yaml", NAMESPACE, pod("one"), pod("two"))
    good = world.store.find("Pod", "shop", "one")
    world.write("a.yaml", NAMESPACE, pod("one").replace("web", "1"), pod("two").replace("web", "new"))
    one, two = world.store.find("Pod", "shop", "one"), world.store.find("Pod", "shop", "two")
    assert one is good
    assert two is not None
    assert two.labels["app"] == "new"
    assert len(world.problems) == 1
    # Also after another look, and after the object moved to another file.
    world.write("b.yaml", "# nothing\n")
    assert world.store.find("Pod", "shop", "one") is good
    world.write("a.yaml", NAMESPACE, pod("two"))
    assert world.store.find("Pod", "shop", "one") is None


def test_a_deleted_file_takes_its_objects_with_it(world: World) -> None:
    world.write("a.yaml", NAMESPACE)
    world.write("b.yaml", pod("one"))
    assert world.remove("b.yaml").changed == {ObjectKey("Pod", "shop", "one")}
    assert world.names == {"Namespace shop"}


def test_of_two_definitions_the_first_in_path_order_holds(world: World) -> None:
    world.write("b.yaml", NAMESPACE, pod("one").replace("web", "b"))
    world.write("c.yaml", pod("one").replace("web", "c"))
    assert world.problems == ["c.yaml:4: metadata.name: Pod shop/one is already defined at b.yaml:5; that one is used"]
    world.write("a.yaml", pod("one").replace("web", "a"))
    one = world.store.find("Pod", "shop", "one")
    assert one is not None
    assert one.labels["app"] == "a"
    world.remove("a.yaml")
    world.remove("c.yaml")
    assert world.problems == []


def test_an_object_in_a_namespace_that_is_not_there_names_those_that_are(world: World) -> None:
    world.write("a.yaml", NAMESPACE, NAMESPACE.replace("shop", "kitchen"), pod("one").replace("namespace: shop", "namespace: shpo"))
    assert world.problems == [
        "a.yaml:13: metadata.namespace: there is no Namespace 'shpo' in this directory; did you mean 'shop'?"
    ]  # fmt: skip
    world.write("a.yaml", NAMESPACE, NAMESPACE.replace("shop", "kitchen"), pod("one").replace("namespace: shop", "namespace: zzz"))
    assert world.problems == ["a.yaml:13: metadata.namespace: there is no Namespace 'zzz' in this directory (known: kitchen, shop)"]
    assert world.names == {"Namespace kitchen", "Namespace shop"}


def test_a_namespace_that_goes_away_leaves_its_objects_but_says_so(world: World) -> None:
    world.write("ns.yaml", NAMESPACE)
    world.write("pods.yaml", pod("one"))
    world.remove("ns.yaml")
    assert world.names == {"Pod shop/one"}
    assert len(world.problems) == 1


def test_policies_of_the_whole_mesh_need_no_namespace_object(world: World) -> None:
    world.write("a.yaml", POLICY.replace("namespace: shop", "namespace: istio-system"))
    assert world.problems == []
    assert world.names == {"AuthorizationPolicy istio-system/allow"}


def test_unknown_kinds_are_ignored_and_named_once(world: World) -> None:
    world.write("a.yaml", NAMESPACE, "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: [odd]\n")
    world.write("b.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: y}\n")
    world.write("c.yaml", "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: y}\n")
    assert world.problems == []
    assert {kind: origin.file for kind, origin in world.store.ignored_kinds.items()} == {
        "apps/v1/Deployment": "a.yaml",
        "serving.knative.dev/v1/Service": "c.yaml",
    }
    assert world.names == {"Namespace shop"}


@pytest.mark.parametrize(("api_version", "kind", "problem"), [
    ("networking.istio.io/v1", "VirtualServce", "kind: 'VirtualServce' is no kind of networking.istio.io; did you mean 'VirtualService'?"),
    ("gateway.networking.k8s.io/v1", "HttpRoute", "kind: 'HttpRoute' is no kind of gateway.networking.k8s.io; did you mean 'HTTPRoute'?"),
    ("v1", "Services", "kind: 'Services' is no kind of v1; did you mean 'Service'?"),
    ("istio.io/v1", "AuthorizationPolicy", "apiVersion: AuthorizationPolicy is of group 'security.istio.io', not of 'istio.io'"),
    ("v1", "HTTPRoute", "apiVersion: HTTPRoute is of group 'gateway.networking.k8s.io', not of ''"),
])  # fmt: skip
def test_a_kind_that_is_surely_a_slip_is_a_mistake_and_what_the_file_defined_stays(
    world: World, api_version: str, kind: str, problem: str
) -> None:
    world.write("a.yaml", NAMESPACE, pod("one"))
    world.write("a.yaml", NAMESPACE, f"apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop}}\nspec: {{}}\n")
    assert [text.split(": ", 1)[1] for text in world.problems] == [problem]
    assert world.store.ignored_kinds == {}
    assert world.names == {"Namespace shop", "Pod shop/one"}


@pytest.mark.parametrize(("api_version", "kind"), [
    ("networking.istio.io/v1", "Gateway"), ("networking.istio.io/v1", "WorkloadGroup"), ("networking.istio.io/v1", "Sidecar"),
    ("gateway.networking.k8s.io/v1", "UDPRoute"), ("gateway.networking.k8s.io/v1alpha2", "BackendLBPolicy"),
    ("networking.k8s.io/v1", "NetworkPolicy"), ("v1", "Endpoints"), ("v1", "PodTemplate"), ("example.com/v1", "Gateway"),
    ("apps/v1", "Service"), ("policy/v1", "PodDisruptionBudget"), ("gateway.networking.x-k8s.io/v1alpha1", "XBackendTrafficPolicy"),
])  # fmt: skip
def test_kinds_of_others_are_no_slips(world: World, api_version: str, kind: str) -> None:
    world.write("a.yaml", NAMESPACE, f"apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop}}\n")
    assert world.problems == []
    assert list(world.store.ignored_kinds) == [f"{api_version}/{kind}"]


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("source:", "sources:", "spec.rules[0].from[0].sources: unknown field; did you mean 'source'?"),
    ("source: {principals: [cluster.local/ns/shop/sa/a]}", "principals: [x]",
     "spec.rules[0].from[0].principals: unknown field; it belongs under 'source'"),
    ("principals", "principal", "spec.rules[0].from[0].source.principal: unknown field; did you mean 'principals'?"),
    ("  rules:", "  action: deny\n  rules:", "spec.action: expected one of ALLOW, DENY, AUDIT, CUSTOM, found 'deny'; did you mean 'DENY'?"),
    ("[cluster.local/ns/shop/sa/a]", "[]",
     "spec.rules[0].from[0].source.principals: is empty: give at least one value, or leave 'principals' out"),
    ("[cluster.local/ns/shop/sa/a]", "", "spec.rules[0].from[0].source.principals: is empty: expected a list, or leave 'principals' out"),
    ("    - source: {principals: [cluster.local/ns/shop/sa/a]}\n", "",
     "spec.rules[0].from: is empty: expected a list, or leave 'from' out"),
    ("{principals: [cluster.local/ns/shop/sa/a]}", "{}", "spec.rules[0].from[0].source: is empty: name at least one attribute"),
    ("{principals: [cluster.local/ns/shop/sa/a]}", "{ipBlocks: [10.0.0.0/33]}",
     "spec.rules[0].from[0].source.ipBlocks[0]: not an IP address or CIDR: '10.0.0.0/33'"),
    ("  - from:", "  - to: [{operation: {ports: ['70000']}}]\n    from:",
     "spec.rules[0].to[0].operation.ports[0]: expected a port from 1 to 65535, found '70000'"),
    ("  - from:", "  - to: [{operation: {ports: [80]}}]\n    from:",
     "spec.rules[0].to[0].operation.ports[0]: expected a string, found a number (80); put it in quotes"),
    ("  - from:", "  - when: [{key: source.ips, values: [1.2.3.4]}]\n    from:",
     "spec.rules[0].when[0].key: unknown attribute 'source.ips'; did you mean 'source.ip'?"),
    ("  - from:", "  - when: [{key: source.ip}]\n    from:", "spec.rules[0].when[0]: 'values' or 'notValues' is required"),
    ("spec:", "spec:\n  selectors: {matchLabels: {app: web}}", "spec.selectors: unknown field; did you mean 'selector'?"),
    ("spec:", "spec:\n  selector: {app: web}", "spec.selector.app: unknown field (known: matchLabels)"),
    ("spec:", "spec:\n  targetRefs:", "spec.targetRefs: is empty: expected a list, or leave 'targetRefs' out"),
    ("spec:", "spec:\n  targetRefs: []", "spec.targetRefs: is empty: add an item, or leave 'targetRefs' out"),
    ("spec:", "spec:\n  selector:", "spec.selector: is empty: expected a mapping, or leave 'selector' out"),
    ("spec:", "specs:", "specs: unknown field; did you mean 'spec'?"),
])  # fmt: skip
def test_a_policy_that_would_say_less_than_it_seems_is_a_mistake(world: World, old: str, new: str, problem: str) -> None:
    world.write("a.yaml", NAMESPACE, POLICY.replace(old, new))
    assert problem in [text.split(": ", 1)[1] for text in world.problems]
    # It never had a good version: it is handed on, to be enforced closed.
    handed_on = world.store.find("AuthorizationPolicy", "shop", "allow")
    assert handed_on is not None
    assert handed_on.problems


def test_a_policy_that_goes_bad_keeps_its_last_good_version(world: World) -> None:
    world.write("a.yaml", NAMESPACE, POLICY)
    good = world.store.find("AuthorizationPolicy", "shop", "allow")
    world.write("a.yaml", NAMESPACE, POLICY.replace("principals", "principal"))
    assert world.store.find("AuthorizationPolicy", "shop", "allow") is good
    assert len(world.problems) == 1


def test_port_modes_need_a_selector(world: World) -> None:
    peer = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: x, namespace: shop}\nspec:\n"
    world.write("a.yaml", NAMESPACE, peer + "  portLevelMtls: {80: {mode: STRICT}, http: {mode: strict}}\n")
    assert [text.split(": ", 1)[1].split(":")[0] for text in world.problems] == ["spec.portLevelMtls", "spec.portLevelMtls.http"]


def test_overlays_are_merged_in_order_and_withdrawn(world: World) -> None:
    world.write("a.yaml", NAMESPACE, pod("one"))
    before = world.store.find("Pod", "shop", "one")
    write_overlay(world.overlay, "Pod", "shop", "one", {"status": {"podIP": "10.0.0.1", "phase": "Running"}, "spec": {"nodeName": "n1"}})
    assert world.store.load().changed == {ObjectKey("Pod", "shop", "one")}
    merged = world.store.find("Pod", "shop", "one")
    assert merged is not None
    assert merged.status == {"podIP": "10.0.0.1", "phase": "Running"}
    assert merged.spec["nodeName"] == "n1"
    assert merged.spec["containers"] == [{"name": "main", "command": ["sleep", "inf"]}]
    remove_overlay(world.overlay, "Pod", "shop", "one")
    world.store.load()
    after = world.store.find("Pod", "shop", "one")
    assert before is not None
    assert after is not None
    assert after.raw == before.raw


def test_a_null_in_an_overlay_removes_and_a_later_overlay_wins(tmp_path: Path) -> None:
    source, first, second = tmp_path / "s", tmp_path / "1", tmp_path / "2"
    source.mkdir()
    (source / "a.yaml").write_text(documents(NAMESPACE, pod("one")))
    write_overlay(first, "Pod", "shop", "one", {"metadata": {"labels": {"app": None, "x": "1"}}, "status": {"phase": "Pending"}})
    write_overlay(second, "Pod", "shop", "one", {"metadata": {"labels": {"x": "2"}}})
    store = DirectoryStore([source, first, second])
    store.load()
    one = store.find("Pod", "shop", "one")
    assert one is not None
    assert one.labels == {"x": "2"}
    assert one.status["phase"] == "Pending"


def test_an_overlay_of_nothing_is_ignored(world: World) -> None:
    write_overlay(world.overlay, "Pod", "shop", "ghost", {"status": {}})
    world.write("a.yaml", NAMESPACE)
    assert world.names == {"Namespace shop"}
    assert world.problems == []


def test_a_mistake_in_an_overlay_names_the_overlay_and_the_object_stays(world: World) -> None:
    world.write("a.yaml", NAMESPACE, pod("one"))
    good = world.store.find("Pod", "shop", "one")
    write_overlay(world.overlay, "Pod", "shop", "one", {"status": {"podIP": 7}})
    world.store.load()
    assert [text.split(": ", 1)[1] for text in world.problems] == ["status.podIP: expected a string, found a number (7); put it in quotes"]
    assert world.problems[0].startswith(str(world.overlay))
    assert world.store.find("Pod", "shop", "one") is good


def test_an_overlay_that_says_the_same_is_not_written_again(world: World) -> None:
    write_overlay(world.overlay, "Node", "", "n1", {"status": {"a": 1}})
    (path,) = world.overlay.iterdir()
    before = path.stat().st_ino
    write_overlay(world.overlay, "Node", "", "n1", {"status": {"a": 1}})
    assert path.stat().st_ino == before


def test_a_file_that_did_not_change_keeps_its_objects_instances(world: World) -> None:
    world.write("a.yaml", NAMESPACE, pod("one"), pod("two"))
    one = world.store.find("Pod", "shop", "one")
    assert not world.store.load()
    world.write("a.yaml", NAMESPACE, pod("one"), pod("two").replace("web", "new"))
    assert world.store.find("Pod", "shop", "one") is one


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x00"])
def test_what_is_no_text_is_told_and_costs_nothing_else(world: World, content: bytes) -> None:
    world.write("a.yaml", NAMESPACE)
    (world.source / "b.yaml").write_bytes(content)
    world.store.load()
    assert len(world.problems) == 1
    assert world.names == {"Namespace shop"}


def test_an_emptied_file_takes_nothing_with_it(world: World) -> None:
    """An editor that truncates before it writes must not open the mesh for a moment."""
    world.write("a.yaml", NAMESPACE, POLICY)
    world.write("a.yaml", "")
    assert world.names == {"Namespace shop", "AuthorizationPolicy shop/allow"}
    assert world.problems == ["a.yaml: cannot be read: empty; what it defined stays until it is deleted or has content again"]
    world.write("a.yaml", "# nothing any more\n")
    assert world.names == set()
    assert world.problems == []


def test_files_that_are_none_do_not_block(world: World) -> None:
    world.write("a.yaml", NAMESPACE)
    os.mkfifo(world.source / "fifo.yaml")
    (world.source / "broken.yaml").symlink_to("nowhere")
    (world.source / "directory.yaml").mkdir()
    with open(world.source / "big.yaml", "wb") as file:
        file.truncate(33 << 20)
    world.store.load()
    assert world.problems == [
        "big.yaml: cannot be read: larger than 32 MiB",
        "broken.yaml: cannot be read: No such file or directory",
        "fifo.yaml: cannot be read: not a regular file",
    ]
    assert world.names == {"Namespace shop"}


def test_a_directory_that_is_away_for_a_moment_deletes_nothing(world: World) -> None:
    """A volume that is remounted must not take every pod of the node out of the mesh."""
    world.write("a.yaml", NAMESPACE, POLICY)
    before = world.names
    away = world.source.rename(world.source.with_name("away"))
    assert world.store.load().changed == frozenset()
    assert world.names == before
    assert world.problems == [".: cannot be listed: No such file or directory; what it defined stays"]
    assert not world.store.load(), "it is told once"
    away.rename(world.source)
    world.store.load()
    assert world.problems == []
    world.remove("a.yaml")
    assert world.names == set()


def test_a_directory_within_that_cannot_be_listed_keeps_what_it_defined(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write("a.yaml", NAMESPACE)
    world.write("sub/b.yaml", POLICY)
    world.write("sub/deep/c.yaml", pod("web"))
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        world.store.load()
        assert len(world.names) == 3
        assert world.problems == ["sub: cannot be listed: Permission denied; what it defined stays"]
    for name in ("sub/b.yaml", "sub/deep/c.yaml"):
        (world.source / name).unlink()
    (world.source / "sub/deep").rmdir()
    (world.source / "sub").rmdir()
    world.store.load()
    assert world.names == {"Namespace shop"}
    assert world.problems == []


def test_a_directory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    store = DirectoryStore([tmp_path / "none"])
    assert not store.load()
    assert store.objects() == []


def watching(world: World, *steps: tuple[Callable[[], object], Callable[[], bool]]) -> int:
    """Do each step while the store watches, until its condition holds; returns how many times changes were reported."""

    async def main() -> int:
        count = 0
        with trio.fail_after(20):
            async with contextlib.aclosing(cast("AsyncGenerator[Changes, None]", world.store.watch())) as changes:
                for act, seen in steps:
                    act()
                    while not seen():
                        await anext(changes)
                        count += 1
        return count

    return trio.run(main)


def test_changes_are_seen_as_they_happen(world: World) -> None:
    def save_by_rename() -> None:
        (world.source / ".a.yaml.swp").write_text(documents(NAMESPACE, pod("two")))
        (world.source / ".a.yaml.swp").rename(world.source / "a.yaml")

    watching(
        world,
        (lambda: (world.source / "a.yaml").write_text(documents(NAMESPACE, pod("one"))), lambda: "Pod shop/one" in world.names),
        (save_by_rename, lambda: world.names == {"Namespace shop", "Pod shop/two"}),
        (lambda: (world.source / "sub").mkdir(), lambda: True),
        (lambda: (world.source / "sub" / "b.yaml").write_text(pod("three")), lambda: "Pod shop/three" in world.names),
        (lambda: write_overlay(world.overlay, "Pod", "shop", "two", {"status": {"podIP": "10.0.0.1"}}),
         lambda: [pod.status for pod in world.store.objects("Pod") if pod.name == "two"] == [{"podIP": "10.0.0.1"}]),
        (lambda: (world.source / "a.yaml").unlink(), lambda: world.names == {"Pod shop/three"}),
    )  # fmt: skip


def test_many_saves_at_once_are_few_changes(world: World) -> None:
    def save_many() -> None:
        (world.source / "ns.yaml").write_text(NAMESPACE)
        for number in range(50):
            (world.source / f"{number}.yaml").write_text(pod(f"p{number}"))

    assert watching(world, (save_many, lambda: len(world.names) == 51)) <= 2


def test_a_directory_made_after_the_watch_began_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "RESCAN_INTERVAL", 0.05)
    world.source.rmdir()

    def make() -> None:
        world.source.mkdir()
        (world.source / "a.yaml").write_text(NAMESPACE)

    watching(world, (make, lambda: "Namespace shop" in world.names))


def test_without_inotify_the_directory_is_looked_at_now_and_then(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def used_up() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(directory_module, "RESCAN_INTERVAL", 0.05)
    monkeypatch.setattr(directory_module, "DirectoryWatch", used_up)
    watching(world, (lambda: (world.source / "a.yaml").write_text(NAMESPACE), lambda: "Namespace shop" in world.names))
