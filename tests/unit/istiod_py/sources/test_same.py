"""The same objects through either source give agents the same messages. (The real API server's side: `tests/cluster/test_source.py`.)"""

from __future__ import annotations

from pathlib import Path

import trio

from mesh.kube.api import ApiClient
from mesh.kube.cluster import ClusterStore
from mesh.kube.kubeconfig import ClusterAccess
from mesh.testing.kube import FakeApiServer
from tests.corpus import MESH, read_manifests
from tests.corpus.messages import load_directory, make_messages


def test_a_directory_and_an_api_server_give_the_same_messages(tmp_path: Path) -> None:
    async def main() -> None:
        api = FakeApiServer()
        for manifest in sorted(read_manifests(MESH), key=lambda manifest: str(manifest["metadata"]["name"])):
            api.put(manifest)
        async with trio.open_nursery() as nursery:
            await nursery.start(api.run)
            store = ClusterStore(ApiClient(ClusterAccess("test", 80, tls=False), connect=api.connect))
            nursery.start_soon(store.run)
            await store.wait_synced()
            assert store.problems == ()
            found = make_messages(store.objects())
            nursery.cancel_scope.cancel()
        wanted = make_messages(load_directory(MESH))
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if found[name] != wanted[name]] == []

    trio.run(main)


def test_the_corpus_has_something_of_everything() -> None:
    kinds = [name.split(" ")[0] for name in make_messages(load_directory(MESH))]
    assert min(kinds.count(kind) for kind in ("workload", "service", "policy")) >= 8
