"""Pods of a node from an API server: found, annotated through their status, never a younger pod of the same name."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import trio
from trio.testing import MockClock

from mesh.kube.api import ApiClient
from mesh.kube.kubeconfig import ClusterAccess
from mesh.testing.kube import FakeApiServer
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
                    assert (web.name, web.enrolment.enrolled, web.netns_path) == ("web", True, "/run/netns/x")
                    assert not await place.is_annotated(web)
                    await place.annotate(web, "enabled")
                    (web,) = (await anext(found)).values()
                    assert web.redirection == "enabled"
                    assert await place.is_annotated(web)
            assert server.requests[-1].path == "/api/v1/namespaces/shop/pods/web/status"
            assert server.requests[-1].body["metadata"]["uid"] == web.uid
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
