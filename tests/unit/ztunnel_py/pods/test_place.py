"""Pods of a node from an API server: found, annotated through their status, never a younger pod of the same name."""

from __future__ import annotations

import os
from contextlib import aclosing
from pathlib import Path

import trio

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import ClusterAccess
from mesh.model.address import parse_ip
from mesh.testing.kube import FakeApiServer
from ztunnel_py.pods.facts import PodFacts
from ztunnel_py.pods.place import ClusterPlace, NodePaths


def test_pods_of_the_node_are_found_and_annotated(tmp_path: Path) -> None:
    async def main() -> None:
        server = FakeApiServer()
        server.put({"kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}})
        for name, node in (("web", "n1"), ("other", "n2")):
            metadata = {"name": name, "namespace": "shop", "annotations": {"ambient.mesh/netns": "/run/netns/x"}}
            spec = {"nodeName": node, "containers": [{"name": "c", "image": "i"}]}
            server.put({"kind": "Pod", "metadata": metadata, "spec": spec, "status": {"phase": "Running", "podIP": "10.0.0.1"}})
        place = ClusterPlace("n1", ApiClient(ClusterAccess("k", 443, tls=False), connect=server.connect), NodePaths(tmp_path, tmp_path))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(place.run)
            with trio.fail_after(100):
                async with aclosing(place.watch()) as found:
                    (web,) = (await anext(found)).values()
                    assert (web.name, web.enrolment.enrolled) == ("web", True)
                    assert web.netns_path == "", "what a pod's maker writes names nobody's namespace"
                    assert not await place.is_annotated(web)
                    await place.annotate(web, "enabled")
                    (web,) = (await anext(found)).values()
                    assert web.redirection == "enabled"
                    assert await place.is_annotated(web)
            assert server.requests[-1].path == "/api/v1/namespaces/shop/pods/web/status"
            assert server.requests[-1].body["metadata"]["uid"] == web.uid
            nursery.cancel_scope.cancel()

    trio.run(main)  # no clock that jumps: it would not wait for threads


def pod(name: str, *, status: dict[str, object], **spec: object) -> dict[str, object]:
    containers = [{"name": "c", "image": "i"}]
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"nodeName": "n1", "containers": containers, **spec},
        "status": status,
    }


def test_a_pod_that_starts_has_the_network_its_container_runtime_told_of(tmp_path: Path) -> None:
    async def main() -> None:
        server = FakeApiServer()
        server.put({"kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}})
        server.put(pod("web", status={"phase": "Pending"}))
        (tmp_path / "cni-1").touch()
        os.link(tmp_path / "cni-1", tmp_path / "other-name")
        place = ClusterPlace("n1", ApiClient(ClusterAccess("k", 443, tls=False), connect=server.connect), NodePaths(tmp_path, tmp_path))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(place.run)
            with trio.fail_after(100):
                async with aclosing(place.watch()) as found:
                    (web,) = (await anext(found)).values()
                    assert web.waiting_for == "the pod has no IP address yet"
                    told = place.learn(web.uid, "/var/run/netns/cni-1", (parse_ip("10.0.0.9"),))
                    (web,) = (await anext(found)).values()
                    assert (web.netns_path, web.ips, web.waiting_for) == (told, (parse_ip("10.0.0.9"),), "")
                    assert told == str(tmp_path / "cni-1")
                    assert place.learn(web.uid, "/run/netns/other-name", ()) == told, "the same namespace"
                    server.put(pod("web", status={"phase": "Running", "podIP": "10.0.0.10"}))
                    while web.ips != (parse_ip("10.0.0.10"),):
                        (web,) = (await anext(found)).values()
                    assert web.netns_path == told
                    place.forget(web.uid)
                    (web,) = (await anext(found)).values()
                    assert web.netns_path == ""
            nursery.cancel_scope.cancel()

    trio.run(main)  # no clock that jumps: it would not wait for threads


def test_a_labelled_pod_on_the_hosts_network_is_known_for_what_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        server = FakeApiServer()
        server.put({"kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}})
        server.put(pod("exporter", status={"phase": "Running", "podIP": "10.0.0.1"}, hostNetwork=True))
        place = ClusterPlace("n1", ApiClient(ClusterAccess("k", 443, tls=False), connect=server.connect), NodePaths(tmp_path, tmp_path))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(place.run)
            async with aclosing(place.watch()) as found:
                (exporter,) = (await anext(found)).values()
            assert not exporter.enrolment
            assert "namespace label" in exporter.unsupported
            place.note(exporter, "NotCaptured", exporter.unsupported, warning=True)
            await server.wait_until(lambda: any(key[0] == "events" for key in server.objects))
            (event,) = (found for key, found in server.objects.items() if key[0] == "events")
            assert (event["type"], event["reason"], event["involvedObject"]["uid"]) == ("Warning", "NotCaptured", exporter.uid)
            nursery.cancel_scope.cancel()

    trio.run(main)  # no clock that jumps: it would not wait for threads


def test_what_changed_while_another_agent_was_in_charge_is_known_before_anything_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        server = FakeApiServer()
        server.put({"kind": "Namespace", "metadata": {"name": "shop"}})
        server.put(pod("web", status={"phase": "Running", "podIP": "10.0.0.1"}))
        place = ClusterPlace("n1", ApiClient(ClusterAccess("k", 443, tls=False), connect=server.connect), NodePaths(tmp_path, tmp_path))

        async def look_first() -> PodFacts:
            async with trio.open_nursery() as in_charge:
                in_charge.start_soon(place.run)
                async with aclosing(place.watch()) as found:
                    (web,) = (await anext(found)).values()
                place.learn(web.uid, str(tmp_path / "reused"), ())
                in_charge.cancel_scope.cancel()
            return web

        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            with trio.fail_after(100):
                web = await look_first()
                assert not web.enrolment
                server.put({"kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}})
                web = await look_first()
                assert web.enrolment
                assert web.netns_path == "", "by now the path may be another pod's"
            nursery.cancel_scope.cancel()

    trio.run(main)  # no clock that jumps: it would not wait for threads


def test_what_a_former_installation_wrote_on_a_pod_is_not_ours(tmp_path: Path) -> None:
    def put_agent(server: FakeApiServer, daemon_set: str) -> None:
        owner = {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "ztunnel", "uid": daemon_set, "controller": True}
        agent = pod("ztunnel-x", status={"phase": "Running", "podIP": "10.0.0.2"})
        server.put({**agent, "metadata": {"name": "ztunnel-x", "namespace": "istio-system", "ownerReferences": [owner]}})

    async def main() -> None:
        server = FakeApiServer()
        for namespace in ("shop", "istio-system"):
            server.put({"kind": "Namespace", "metadata": {"name": namespace, "labels": {"istio.io/dataplane-mode": "ambient"}}})
        put_agent(server, "second")
        told = {"ambient.istio.io/redirection": "enabled", "ambient.mesh/captured-by": "first"}
        web = pod("web", status={"phase": "Running", "podIP": "10.0.0.1"})
        server.put({**web, "metadata": {**web["metadata"], "annotations": told}})
        access = ClusterAccess("k", 443, tls=False)
        agent = ("istio-system", "ztunnel-x")
        place = ClusterPlace("n1", ApiClient(access, connect=server.connect), NodePaths(tmp_path, tmp_path), agent=agent)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(place.run)
            with trio.fail_after(100):
                async with aclosing(place.watch()) as found:
                    facts = next(each for each in (await anext(found)).values() if each.name == "web")
                    assert not await place.is_annotated(facts)
                    await place.annotate(facts, "enabled")
                    assert server.requests[-1].body["metadata"]["annotations"] == {**told, "ambient.mesh/captured-by": "second"}
                    while not await place.is_annotated(facts):  # noqa: ASYNC110 - nothing tells of it, since nothing asks for it
                        await trio.sleep(0.01)
                    put_agent(server, "third")  # adopted by one that was made anew
                    while await place.is_annotated(facts):  # noqa: ASYNC110 - likewise
                        await trio.sleep(0.01)
                    await place.annotate(facts, "")
                    assert server.requests[-1].body["metadata"]["annotations"] == dict.fromkeys(told)
            nursery.cancel_scope.cancel()

    trio.run(main)  # no clock that jumps: it would not wait for threads
