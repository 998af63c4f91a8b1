"""Fetched key sets: waited for once, renewed beside the traffic, kept when the server is gone, and never a reason to hammer it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise

import h11
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mesh.http.message import Request
from mesh.model.l7.policy import JwtRule, RequestAuthentication
from mesh.model.l7.routing import Origin
from mesh.runtime.outbound import Dialler, OutboundError, permit_any
from tests.corpus.tokens import KEYS, NOW, OTHER_RSA_KEY, RSA_KEY, bearer, jwk, key_set, sign
from waypoint_py.policy.facts import TokenFacts
from waypoint_py.policy.jwks import MAX_SETS, REFRESH, UNKNOWN_KID, Authenticator, KeyStore, fetch_through
from waypoint_py.policy.keys import KeySet
from waypoint_py.policy.tokens import KeysFailed, TokenChecker
from waypoint_py.verdict import LocalReply, Park

RULE = JwtRule("a", jwks_uri="https://id/keys", timeout=5.0)


class Server:
    """A key server: gives ``body``, or raises it; counts."""

    def __init__(self, body: str | Exception = KEYS, delay: float = 0.0) -> None:
        self.body = body
        self.delay = delay
        self.asked: list[str] = []

    async def fetch(self, uri: str, within: float) -> bytes:
        self.asked.append(uri)
        await trio.sleep(self.delay)
        if isinstance(self.body, Exception):
            raise self.body
        return self.body.encode()


def run(server: Server, test: Callable[[KeyStore, Authenticator, TokenChecker], Awaitable[None]]) -> None:
    async def main() -> None:
        store = KeyStore(server.fetch, clock=trio.current_time, rng=lambda: 0.0)
        checker = TokenChecker([RequestAuthentication(Origin("RequestAuthentication", "ns", "jwt"), rules=(RULE,))], store.find)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            await test(store, Authenticator(store, now=lambda: NOW), checker)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def request(token: str | None = None) -> Request:
    headers = bearer(token or sign())
    return Request(b"GET", b"http", b"h", b"/", [(name.encode(), value.encode()) for name, value in headers])


async def ask(authenticator: Authenticator, checker: TokenChecker, token: str | None = None) -> tuple[bool, LocalReply | None]:
    """Whether the request had to wait, and what was said."""
    verdict = authenticator.check(checker, request(token), lambda facts: None)
    return (True, await verdict.run()) if isinstance(verdict, Park) else (False, verdict)


def test_only_the_first_requests_wait_and_all_for_one_fetch() -> None:
    server = Server(delay=1.0)

    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        accepted: list[TokenFacts | None] = []
        parks = [authenticator.check(checker, request(), accepted.append) for _ in range(5)]
        async with trio.open_nursery() as nursery:
            for park in parks:
                assert isinstance(park, Park)
                assert "https://id/keys" in park.why
                nursery.start_soon(park.run)
        assert [facts.subject for facts in accepted if facts] == ["s"] * 5
        assert await ask(authenticator, checker) == (False, None)

    run(server, check)
    assert server.asked == [RULE.jwks_uri]


def test_a_request_without_token_waits_for_nothing() -> None:
    server = Server()

    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        assert authenticator.check(checker, Request(b"GET", b"http", b"h", b"/", []), lambda facts: None) is None

    run(server, check)
    assert server.asked == []


def test_a_request_that_waited_is_changed_like_one_that_did_not() -> None:
    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        for _ in range(2):
            asked = request()
            verdict = authenticator.check(checker, asked, lambda facts: None)
            assert (await verdict.run() if isinstance(verdict, Park) else verdict) is None
            assert asked.headers == []

    run(Server(), check)


def test_a_fetch_that_fails_is_401_and_is_tried_again_after_a_pause() -> None:
    server = Server(OutboundError("no route"))

    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        waited, reply = await ask(authenticator, checker)
        assert reply is not None
        assert (waited, reply.status, reply.body) == (True, 401, b"Jwks remote fetch is failed")
        waited, reply = await ask(authenticator, checker)
        assert (waited, reply is None, len(server.asked)) == (False, False, 1)
        server.body = KEYS
        await trio.sleep(1.5)
        assert await ask(authenticator, checker) == (True, None)

    run(server, check)


def test_pauses_grow_but_not_beyond_a_minute() -> None:
    server = Server(OutboundError("no route"))

    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        times = []
        while trio.current_time() < 600:
            before = len(server.asked)
            await ask(authenticator, checker)
            if len(server.asked) > before:
                times.append(trio.current_time())
            await trio.sleep(0.5)
        pauses = [round(later - sooner) for sooner, later in pairwise(times)]
        assert pauses[:5] == [1, 2, 4, 8, 16]
        assert set(pauses[6:]) == {60}

    run(server, check)


@pytest.mark.parametrize("body", ["", "no JSON", "[]", '{"keys":[]}', '{"keys":5}', "[" * 100_000, key_set({"kty": "oct", "k": "AAAA"})])
def test_an_answer_that_is_no_key_set_is_a_failure(body: str) -> None:
    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        _, reply = await ask(authenticator, checker)
        assert reply is not None
        assert reply.body == b"Jwks remote fetch is failed"
        assert isinstance(store.find(RULE), KeysFailed)

    run(Server(body), check)


def test_keys_are_renewed_beside_the_traffic_and_kept_while_they_cannot_be() -> None:
    server = Server()

    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        await ask(authenticator, checker)
        server.body = OutboundError("gone")
        await trio.sleep(REFRESH + 1)
        assert await ask(authenticator, checker) == (False, None)
        await wait_all_tasks_blocked()
        assert len(server.asked) == 2
        assert await ask(authenticator, checker) == (False, None)
        server.body = key_set(jwk(OTHER_RSA_KEY))
        await trio.sleep(120)
        assert await ask(authenticator, checker) == (False, None)
        await wait_all_tasks_blocked()
        _, reply = await ask(authenticator, checker)
        assert reply is not None
        assert await ask(authenticator, checker, sign(OTHER_RSA_KEY)) == (False, None)

    run(server, check)


def test_the_same_keys_again_forget_no_verified_token() -> None:
    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        await ask(authenticator, checker)
        before = store.find(RULE)
        await trio.sleep(REFRESH + 1)
        store.find(RULE)
        await wait_all_tasks_blocked()
        assert isinstance(before, KeySet)
        assert store.find(RULE) is before

    run(Server(), check)


def test_a_new_kid_is_looked_for_and_made_up_ones_only_now_and_then() -> None:
    server = Server(key_set(jwk(RSA_KEY, kid="old")))

    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        rotated = sign(OTHER_RSA_KEY, headers={"kid": "new"})
        await ask(authenticator, checker)
        server.body = key_set(jwk(RSA_KEY, kid="old"), jwk(OTHER_RSA_KEY, kid="new"))
        _, reply = await ask(authenticator, checker, rotated)
        assert reply is not None
        await wait_all_tasks_blocked()
        assert await ask(authenticator, checker, rotated) == (False, None)
        for number in range(100):
            await ask(authenticator, checker, sign(headers={"kid": f"made up {number}"}))
            await wait_all_tasks_blocked()
        assert len(server.asked) == 2
        await trio.sleep(UNKNOWN_KID + 1)
        await ask(authenticator, checker, sign(headers={"kid": "made up"}))
        await wait_all_tasks_blocked()
        assert len(server.asked) == 3

    run(server, check)


def test_sets_are_kept_within_bounds_and_the_longest_unused_goes() -> None:
    server = Server()

    async def check(store: KeyStore, authenticator: Authenticator, checker: TokenChecker) -> None:
        rules = [JwtRule("a", jwks_uri=f"https://id/{number}") for number in range(MAX_SETS)]
        for rule in rules:
            await store.wait_fetched(rule)
            await trio.sleep(0.01)
        store.find(rules[0])
        await store.wait_fetched(RULE)
        assert isinstance(store.find(RULE), KeySet)
        assert store.find(rules[0]) is not None
        assert store.find(rules[1]) is None

    run(server, check)


def test_a_store_that_is_not_running_refuses_rather_than_waits() -> None:
    async def main() -> None:
        store = KeyStore(Server().fetch)
        checker = TokenChecker([RequestAuthentication(Origin("RequestAuthentication", "ns", "jwt"), rules=(RULE,))], store.find)
        waited, reply = await ask(Authenticator(store, now=lambda: NOW), checker)
        assert reply is not None
        assert (waited, reply.body) == (True, b"Jwks remote fetch is failed")

    trio.run(main)


def test_keys_are_fetched_from_a_server_and_from_this_machine_never() -> None:
    """Over TCP: with the addresses that are refused, and with all permitted."""

    async def serve(stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        connection.receive_data(bytes(await stream.receive_some(65536)))
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(KEYS)
        await stream.send_all(head + KEYS.encode())

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            uri = f"http://localhost:{port}/keys"
            assert await fetch_through(Dialler(refuse=permit_any))(uri, 5.0) == KEYS.encode()
            with pytest.raises(OutboundError, match="loopback"):
                await fetch_through()(uri, 5.0)
            nursery.cancel_scope.cancel()

    trio.run(main)
