"""Whether an agent that is told to end may leave rules behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from mesh.kube.api import ApiError, ApiUnavailable
from ztunnel_py.pods.departure import ClusterDepartures, Departure, DirectoryDepartures, Json, judge

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
    assert judge(answer, node, allowed_before=True).for_good is for_good


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_agent_that_never_could_ask_releases_nothing(status: int) -> None:
    assert not judge(ApiError(status, "", "no"), NODE, allowed_before=False).for_good


class FakeClient:
    def __init__(self, answer: Callable[[str], Json]) -> None:
        self.answer = answer

    async def get(self, path: str) -> Json:
        await trio.lowlevel.checkpoint()
        return self.answer(path)


def departures(answer: Callable[[str], Json]) -> tuple[FakeClient, ClusterDepartures]:
    client = FakeClient(answer)
    return client, ClusterDepartures(client, "istio-system", "n1")  # type: ignore[arg-type]


def test_rights_that_were_there_and_are_gone_mean_that_the_mesh_is_taken_down(autojump: trio.testing.MockClock) -> None:
    def forbid(path: str) -> Json:
        raise ApiError(403, "Forbidden", "no")

    async def main() -> None:
        client, ours = departures(lambda path: daemonset() if "daemonsets/ztunnel" in path else NODE)
        await ours.run()
        assert not (await ours.find()).for_good
        client.answer = forbid
        assert (await ours.find()).for_good
        _, others = departures(forbid)
        assert not (await others.find()).for_good

    trio.run(main, clock=autojump)


def test_an_api_server_that_is_away_or_silent_releases_nothing(autojump: trio.testing.MockClock) -> None:
    def unavailable(path: str) -> Json:
        raise ApiUnavailable("connection refused")

    class Silent:
        async def get(self, path: str) -> Json:
            await trio.sleep_forever()

    async def main() -> None:
        assert not (await departures(unavailable)[1].find()).for_good
        found = await ClusterDepartures(Silent(), "istio-system", "n1").find()  # type: ignore[arg-type]
        assert found == Departure(False, "the API server did not answer within 3 s")

    trio.run(main, clock=autojump)


def test_without_an_api_server_a_file_says_it(tmp_path: Path) -> None:
    assert not trio.run(DirectoryDepartures(tmp_path).find).for_good
    (tmp_path / "uninstall").touch()
    assert trio.run(DirectoryDepartures(tmp_path).find).for_good


@pytest.fixture
def autojump() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)
