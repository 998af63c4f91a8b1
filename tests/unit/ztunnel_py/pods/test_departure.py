"""Whether an agent that is told to end may leave rules behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from mesh.kube.api import ApiError, ApiUnavailable
from ztunnel_py.pods.departure import ClusterDepartures, Departure, DirectoryDepartures, Json, judge, settle

NAMESPACE: Json = {"metadata": {"name": "istio-system"}}
EMPTIED: Json = {"metadata": {"name": "istio-system", "deletionTimestamp": "2026-11-28T00:00:00Z"}}
NODE: Json = {"metadata": {"name": "n1", "labels": {"kubernetes.io/os": "linux", "mesh": "no"}}}


def daemonset(selector: dict[str, str] | None = None, deleted: str | None = None) -> Json:
    metadata: dict[str, object] = {"name": "ztunnel"} | ({"deletionTimestamp": deleted} if deleted else {})
    return {"metadata": metadata, "spec": {"template": {"spec": {"nodeSelector": selector} if selector else {}}}}


@pytest.mark.parametrize(
    ("answer", "node", "for_good"),
    [
        (daemonset(), NODE, False),
        (daemonset({"kubernetes.io/os": "linux"}), NODE, False),
        (daemonset({"mesh": "yes"}), NODE, True),
        (daemonset({"mesh": "yes"}), ApiError(403, "Forbidden", "no"), False),
        (daemonset(deleted="2026-11-28T00:00:00Z"), NODE, True),
        (ApiError(404, "NotFound", "gone"), NODE, True),
        (ApiError(403, "Forbidden", "no"), NODE, True),
        (ApiError(401, "Unauthorized", "no"), NODE, True),
        (ApiError(500, "InternalError", "etcd"), NODE, False),
        ({"metadata": {"deletionTimestamp": 1}}, NODE, False),
    ],
)
def test_pods_are_released_when_no_agent_will_come_and_not_in_doubt(answer: Json | ApiError, node: Json | ApiError, for_good: bool) -> None:
    assert judge(answer, node, NAMESPACE, allowed_before=True, sure=True).for_good is for_good


@pytest.mark.parametrize(
    ("namespace", "for_good", "certain"),
    [
        (NAMESPACE, False, True),
        (EMPTIED, True, True),
        (ApiError(404, "NotFound", "gone"), False, False),
        (ApiError(403, "Forbidden", "no"), False, False),
        (ApiError(500, "InternalError", "etcd"), False, True),
    ],
)
def test_a_namespace_that_is_deleted_takes_the_agent_with_it_before_its_daemon_set(
    namespace: Json | ApiError, for_good: bool, certain: bool
) -> None:
    found = judge(daemonset(), NODE, namespace, allowed_before=True, sure=False)
    assert (found.for_good, found.certain) == (for_good, certain)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_agent_that_never_could_ask_releases_nothing(status: int) -> None:
    assert not judge(ApiError(status, "", "no"), NODE, NAMESPACE, allowed_before=False, sure=True).for_good


class FakeClient:
    def __init__(self, answer: Callable[[str], Json]) -> None:
        self.answer = answer

    async def get(self, path: str) -> Json:
        await trio.lowlevel.checkpoint()
        return self.answer(path)


def departures(answer: Callable[[str], Json]) -> tuple[FakeClient, ClusterDepartures]:
    client = FakeClient(answer)
    return client, ClusterDepartures(client, "istio-system", "n1", 5.0)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_gone_for_a_while_means_that_the_mesh_is_taken_down(autojump: trio.testing.MockClock, status: int) -> None:
    """A moment is not enough: an API server that starts, or a pod deleted by force, whose token ends with it, looks the same."""

    def well(path: str) -> Json:
        return daemonset() if "daemonsets/ztunnel" in path else NODE

    def gone(path: str) -> Json:
        raise ApiError(status, "", "no")

    def unavailable(path: str) -> Json:
        raise ApiUnavailable("connection refused")

    async def main() -> None:
        client, ours = departures(well)
        await ours.run()
        assert not (await ours.find()).for_good
        for between in (well, unavailable):
            client.answer = gone
            found = await ours.find()
            assert (found.for_good, found.certain) == (False, False)
            await trio.sleep(4)
            assert not (await ours.find()).for_good
            client.answer = between
            assert not (await ours.find()).for_good
        client.answer = gone
        assert not (await ours.find()).for_good
        await trio.sleep(5)
        found = await ours.find()
        assert (found.for_good, found.certain) == (True, True)
        _, others = departures(gone)
        for _ in range(2):
            assert not (await others.find()).for_good
            await trio.sleep(60)

    trio.run(main, clock=autojump)


def test_an_agent_that_another_follows_waits_for_no_proof(autojump: trio.testing.MockClock) -> None:
    """Its pod was deleted by force, and its token with it: nobody will ever tell it that all is well."""

    def forbid(path: str) -> Json:
        raise ApiError(401, "Unauthorized", "no")

    async def main() -> None:
        client, ours = departures(lambda path: daemonset() if "daemonsets/ztunnel" in path else NODE)
        await ours.run()
        client.answer = forbid
        began = trio.current_time()
        assert not (await settle(ours, began + 60, lambda: trio.current_time() > began + 2)).for_good
        assert trio.current_time() < began + 5
        assert (await settle(ours, began + 60, lambda: False)).for_good
        client.answer = lambda path: daemonset()
        await ours.find()
        client.answer = forbid
        assert not (await settle(ours, trio.current_time() + 3, lambda: False)).for_good, "too late, and in doubt"

    trio.run(main, clock=autojump)


def test_an_api_server_that_is_away_or_silent_releases_nothing(autojump: trio.testing.MockClock) -> None:
    def unavailable(path: str) -> Json:
        raise ApiUnavailable("connection refused")

    class Silent:
        async def get(self, path: str) -> Json:
            await trio.sleep_forever()

    async def main() -> None:
        assert not (await departures(unavailable)[1].find()).for_good
        found = await ClusterDepartures(Silent(), "istio-system", "n1", 5.0).find()
        assert found == Departure(False, "the API server did not answer within 3 s", certain=False)

    trio.run(main, clock=autojump)


def test_without_an_api_server_a_file_says_it(tmp_path: Path) -> None:
    assert not trio.run(DirectoryDepartures(tmp_path).find).for_good
    (tmp_path / "uninstall").touch()
    assert trio.run(DirectoryDepartures(tmp_path).find).for_good


@pytest.fixture
def autojump() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)
