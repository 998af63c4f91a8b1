"""Key sets that the control plane fetches: kept while they can't be renewed, asked for no oftener than they must be."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trio.testing

from istiod_py.jwks import MAX_SOURCES, REFRESH, FetchFailed, KeySetKeeper, fetch_from_outside
from istiod_py.keyarchive import KEPT, KeptSet
from istiod_py.translate.l7.authentication import KeySource

KEYS = json.dumps({"keys": [{"kty": "RSA", "n": "1", "e": "AQAB"}]})
OTHER = json.dumps({"keys": []})
SOURCE = KeySource("https://id.example.com/keys")


class Web:
    """URLs and what is behind them: a body, or a failure."""

    def __init__(self, **answers: object) -> None:
        self.answers: dict[str, object] = {"https://id.example.com/keys": KEYS}
        self.asked: list[tuple[float, str]] = []
        self.delay = 0.0

    async def fetch(self, url: str, within: float, limit: int) -> bytes:
        self.asked.append((trio.current_time(), url))
        await trio.sleep(self.delay)
        answer = self.answers.get(url)
        if answer is None:
            raise FetchFailed(f"{url}: nobody there")
        assert isinstance(answer, str | bytes)
        return answer.encode() if isinstance(answer, str) else answer

    @property
    def times(self) -> list[float]:
        """Seconds between fetches."""
        times = [time for time, _ in self.asked]
        return [round(later - earlier) for earlier, later in itertools.pairwise(times)]


class Steady(random.Random):
    def random(self) -> float:
        return 0.0


@asynccontextmanager
async def running(web: Web, refresh: float = REFRESH) -> AsyncGenerator[KeySetKeeper, None]:
    keeper = KeySetKeeper(web.fetch, refresh=refresh, rng=Steady(), wall=lambda: 1_800_000_000.0 + trio.current_time())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        yield keeper
        nursery.cancel_scope.cancel()


def run(test: Callable[[], object]) -> None:
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


async def wait_until(holds: Callable[[], bool], keeper: KeySetKeeper) -> None:
    with trio.fail_after(KEPT * 2):
        while not holds():
            await keeper.wait_changed()


def test_a_set_is_fetched_at_once_and_renewed_every_twenty_minutes() -> None:
    async def main() -> None:
        web = Web()
        async with running(web) as keeper:
            keeper.want({SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)
            assert keeper.key_sets == {SOURCE: KEYS}
            web.answers[SOURCE.uri] = OTHER
            await wait_until(lambda: keeper.key_sets[SOURCE] == OTHER, keeper)
            await trio.sleep(REFRESH + 1)
            assert web.times == [REFRESH, REFRESH]

    run(main)


def test_a_set_that_cannot_be_renewed_stays_and_the_reason_is_told() -> None:
    async def main() -> None:
        web = Web()
        async with running(web) as keeper:
            keeper.want({SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)
            del web.answers[SOURCE.uri]
            await wait_until(lambda: bool(keeper.problems), keeper)
            assert keeper.key_sets == {SOURCE: KEYS}
            stay = "the keys that were fetched at 2027-01-15T08:00:00Z stay in use"
            assert keeper.problems == {SOURCE: f"nobody there; {stay}"}
            web.answers[SOURCE.uri] = KEYS
            await wait_until(lambda: not keeper.problems, keeper)

    run(main)


def test_failures_are_tried_again_after_one_minute_up_to_sixty() -> None:
    async def main() -> None:
        web = Web()
        async with running(web) as keeper:
            keeper.want({SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)
            web.answers.clear()
            await trio.sleep(6 * 3600)
            assert web.times[:10] == [REFRESH, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
            assert keeper.key_sets == {SOURCE: KEYS}

    run(main)


def test_a_set_that_was_never_had_is_tried_again_at_once_and_seldom_later() -> None:
    async def main() -> None:
        web = Web()
        web.answers.clear()
        async with running(web) as keeper:
            keeper.want({SOURCE: 5.0})
            await trio.sleep(5 * 3600)
            assert web.times[:14] == [*(2**power for power in range(12)), 3600, 3600]
            assert keeper.key_sets == {}

    run(main)


def test_a_set_can_be_renewed_oftener_and_its_failures_are_then_no_reason_to_wait_longer() -> None:
    async def main() -> None:
        web = Web()
        async with running(web, refresh=5.0) as keeper:
            keeper.want({SOURCE: 5.0})
            await trio.sleep(11)
            web.answers.clear()
            await trio.sleep(40)
            assert web.times[:5] == [5, 5, 5, 5, 10]

    run(main)


def test_a_server_that_never_answers_costs_its_timeout() -> None:
    async def main() -> None:
        web = Web()
        web.delay = 1e6
        async with running(web) as keeper:
            keeper.want({SOURCE: 2.0})
            await wait_until(lambda: bool(keeper.problems), keeper)
            assert trio.current_time() == pytest.approx(2.0)
            assert keeper.problems == {SOURCE: "no whole answer within 2 s; until there are keys, its tokens are refused"}

    run(main)


@pytest.mark.parametrize("body", ["", "[]", '{"keys": {}}', '{"keys": [1]}', '{"keys": [{}]}', "<html>", b"\xff\xfe", "[" * 100_000])
def test_what_is_no_key_set_does_not_replace_one(body: str | bytes) -> None:
    async def main() -> None:
        web = Web()
        async with running(web) as keeper:
            keeper.want({SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)
            web.answers[SOURCE.uri] = body
            await wait_until(lambda: bool(keeper.problems), keeper)
            assert keeper.key_sets == {SOURCE: KEYS}

    run(main)


ISSUER = KeySource("", "https://id.example.com/tenant/")
DOCUMENT = "https://id.example.com/tenant/.well-known/openid-configuration"


def test_without_a_uri_the_issuers_document_says_where_the_keys_are() -> None:
    async def main() -> None:
        web = Web()
        web.answers[DOCUMENT] = json.dumps({"issuer": ISSUER.issuer, "jwks_uri": SOURCE.uri})
        async with running(web) as keeper:
            keeper.want({ISSUER: 5.0})
            await wait_until(lambda: ISSUER in keeper.key_sets, keeper)
            assert [url for _, url in web.asked] == [DOCUMENT, SOURCE.uri]

    run(main)


@pytest.mark.parametrize(("document", "because"), [
    ({"issuer": "https://other.example.com", "jwks_uri": SOURCE.uri}, "another issuer"),
    ({"issuer": ISSUER.issuer, "jwks_uri": "file:///etc/passwd"}, "no jwks_uri in it that is a URL"),
    ({"issuer": ISSUER.issuer}, "no jwks_uri in it that is a URL"),
    ([], "no jwks_uri in it that is a URL"),
])  # fmt: skip
def test_a_document_that_is_not_the_issuers_is_not_followed(document: object, because: str) -> None:
    async def main() -> None:
        web = Web()
        web.answers[DOCUMENT] = json.dumps(document)
        async with running(web) as keeper:
            keeper.want({ISSUER: 5.0})
            await wait_until(lambda: bool(keeper.problems), keeper)
            assert because in keeper.problems[ISSUER]
            assert len(web.asked) == 1

    run(main)


def test_an_issuer_that_is_no_url_is_not_asked() -> None:
    async def main() -> None:
        web = Web()
        source = KeySource("", "testing@secure.istio.io")
        async with running(web) as keeper:
            keeper.want({source: 5.0})
            await wait_until(lambda: bool(keeper.problems), keeper)
            assert web.asked == []

    run(main)


def test_a_set_that_is_not_wanted_is_not_fetched_but_remembered_for_a_week() -> None:
    async def main() -> None:
        web = Web()
        async with running(web) as keeper:
            keeper.want({SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)
            keeper.want({})
            await trio.sleep(KEPT - 10)
            assert len(web.asked) == 1
            assert SOURCE in keeper.key_sets
            await trio.sleep(20)
            assert keeper.key_sets == {}
            keeper.want({SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)

    run(main)


def test_what_an_earlier_process_had_is_used_at_once_and_until_there_is_something_newer() -> None:
    async def main() -> None:
        web = Web()
        web.answers.clear()
        async with running(web) as keeper:
            keeper.recall({SOURCE: KeptSet(KEYS, 1_799_990_000.0)})
            keeper.want({SOURCE: 5.0})
            await keeper.wait_tried()
            assert keeper.key_sets == {SOURCE: KEYS}
            await wait_until(lambda: bool(keeper.problems), keeper)
            assert trio.current_time() == 0, "it is renewed at once"
            assert keeper.problems[SOURCE].endswith("the keys that were fetched at 2027-01-15T05:13:20Z stay in use")
            assert keeper.key_sets == {SOURCE: KEYS}
            web.answers[SOURCE.uri] = OTHER
            await wait_until(lambda: not keeper.problems, keeper)
            assert trio.current_time() == 60
            assert keeper.kept == {SOURCE: KeptSet(OTHER, 1_800_000_060.0)}

    run(main)


def test_what_was_fetched_is_not_replaced_by_what_an_earlier_process_had() -> None:
    async def main() -> None:
        async with running(Web()) as keeper:
            keeper.want({SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)
            keeper.recall({SOURCE: KeptSet(OTHER, 1_799_990_000.0)})
            assert keeper.key_sets == {SOURCE: KEYS}

    run(main)


def test_all_are_tried_once_each_has_its_set_or_a_reason() -> None:
    async def main() -> None:
        web = Web()
        web.delay = 1
        async with running(web) as keeper:
            await keeper.wait_tried()
            began = trio.current_time()
            keeper.want({SOURCE: 5, KeySource("https://nobody.example.com/keys"): 5})
            await keeper.wait_tried()
            assert (len(keeper.key_sets), len(keeper.problems)) == (1, 1)
            assert trio.current_time() - began == pytest.approx(1)

    run(main)


def test_one_slow_server_holds_up_no_other() -> None:
    async def main() -> None:
        web = Web()
        slow = KeySource("https://slow.example.com/")

        async def fetch(url: str, within: float, limit: int) -> bytes:
            if url == slow.uri:
                await trio.sleep_forever()
            return await web.fetch(url, within, limit)

        keeper = KeySetKeeper(fetch, rng=Steady())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            keeper.want({slow: 60.0, SOURCE: 5.0})
            await wait_until(lambda: SOURCE in keeper.key_sets, keeper)
            assert trio.current_time() < 1
            nursery.cancel_scope.cancel()

    run(main)


def test_more_sources_than_can_be_looked_after_are_not_taken() -> None:
    async def main() -> None:
        web = Web()
        async with running(web) as keeper:
            keeper.want({KeySource(f"https://h{index}.example.com/"): 5.0 for index in range(MAX_SOURCES + 50)})
            await trio.sleep(30)
            assert len({url for _, url in web.asked}) == MAX_SOURCES

    run(main)


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/latest/", "http://127.0.0.1:1/", "http://[::1]:1/", "http://[fe80::1]/", "file:///x"]
)
def test_addresses_of_this_machine_and_its_cloud_are_not_asked(url: str) -> None:
    with pytest.raises(FetchFailed):
        trio.run(partial(fetch_from_outside, url, 5.0, 1000))
