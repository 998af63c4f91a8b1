"""Wherever the connection is cut, in a list or in the events after it, the store ends in the server's state."""

from __future__ import annotations

import random

import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mesh.kube import reflector
from mesh.kube.api import ApiClient
from mesh.kube.cluster import ClusterStore
from mesh.kube.kubeconfig import ClusterAccess
from mesh.testing.kube import FakeApiServer

NAMES = st.sampled_from("abcdefgh")
CHANGES = st.one_of(
    st.tuples(st.just("put"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("remove"), NAMES, st.just(0)),
    st.tuples(st.sampled_from(["compact", "cut", "bookmarks", "pause"]), st.just(""), st.just(0)),
)


def change(server: FakeApiServer, action: str, name: str, value: int) -> None:
    match action:
        case "put":
            server.put({"kind": "Namespace", "metadata": {"name": name, "labels": {"v": str(value)}}})
        case "remove" if server.find("Namespace", "", name):
            server.remove("Namespace", "", name)
        case "compact":
            server.compact()
        case "cut":
            server.cut_watches()
        case "bookmarks":
            server.bookmarks = not server.bookmarks


@settings(max_examples=150, deadline=None)
@example([], [("pause", "", 0), ("put", "a", 0), ("compact", "", 0)], [167, 178, 70], 0)  # cut amid the answer that the watch is too old
@given(st.lists(CHANGES, max_size=12), st.lists(CHANGES, max_size=25), st.lists(st.integers(1, 1500), max_size=12), st.integers(0, 2**32))
def test_cut_anywhere_the_end_is_the_servers_state(
    before: list[tuple[str, str, int]], after: list[tuple[str, str, int]], cuts: list[int], seed: int
) -> None:
    async def main() -> None:
        server = FakeApiServer()
        for step in before:
            change(server, *step)
        server.faults.cuts = list(cuts)
        store = ClusterStore(
            ApiClient(ClusterAccess("kubernetes", 443, tls=False), connect=server.connect), ("Namespace",), rng=random.Random(seed)
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            nursery.start_soon(store.run)
            for step in after:
                change(server, *step)
                if step[0] == "pause":
                    await trio.sleep(5)
            with trio.fail_after(100_000):
                await store.wait_synced()
                wanted = {key[2]: obj["metadata"]["labels"] for key, obj in server.objects.items()}
                while {obj.name: obj.labels for obj in store.objects()} != wanted or server.faults.cuts or store.problems:
                    await trio.sleep(1)
                    if server.faults.cuts:
                        server.cut_watches()
            nursery.cancel_scope.cancel()

    page, reflector.PAGE = reflector.PAGE, 3  # lists of a few objects are to have pages too
    try:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    finally:
        reflector.PAGE = page
