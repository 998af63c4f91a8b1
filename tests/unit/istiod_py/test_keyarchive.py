"""Key sets that outlive the control plane: what is written, what is believed, and what several writers make of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from istiod_py.keyarchive import (
    FILE,
    GRAIN,
    KEPT,
    MAX_ARCHIVE,
    SECRET,
    ArchiveFailed,
    FileArchive,
    KeptSet,
    SecretArchive,
    decode,
    encode,
    find_sets,
    merge,
)
from istiod_py.translate.l7.authentication import KeySource
from mesh.kube.api import ApiClient
from mesh.testing.kube import FakeApiServer

NOW = 1_800_000_000.0
BY_URI, BY_ISSUER = KeySource("https://id.example.com/keys"), KeySource("", "https://id.example.com")


def keys(kid: str) -> str:
    return json.dumps({"keys": [{"kty": "RSA", "kid": kid, "n": "1", "e": "AQAB"}]})


def test_what_is_written_is_read_again() -> None:
    sets = {BY_URI: KeptSet(keys("a"), NOW), BY_ISSUER: KeptSet(keys("b"), NOW - 60)}
    assert decode(encode(sets), NOW) == sets
    assert decode(encode({}), NOW) == {}


def test_a_set_that_was_fetched_too_long_ago_is_forgotten() -> None:
    content = encode({BY_URI: KeptSet(keys("a"), NOW - KEPT), BY_ISSUER: KeptSet(keys("b"), NOW - KEPT + 1)})
    assert set(decode(content, NOW)) == {BY_ISSUER}


def test_a_set_of_a_clock_that_was_fast_goes_before_none_that_is_fetched_now() -> None:
    content = encode({BY_URI: KeptSet(keys("a"), NOW + 1e9)})
    assert decode(content, NOW)[BY_URI].keys == keys("a")
    changed = merge({BY_URI: KeptSet(keys("b"), NOW)}, content, NOW)
    assert changed is not None
    assert decode(changed, NOW) == {BY_URI: KeptSet(keys("b"), NOW)}


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[1]", b"\xff", b"[" * 100_000, b'[{"uri":"u","issuer":"","keys":"no set","fetched":1800000000}]', b'[{"uri":"u"}]'],
)
def test_what_none_of_ours_has_written_is_not_believed_and_replaced(content: bytes) -> None:
    assert find_sets(content, NOW) == {}
    ours = {BY_URI: KeptSet(keys("a"), NOW)}
    assert merge(ours, content, NOW) == encode(ours)


def test_what_was_fetched_later_stays() -> None:
    older, newer = KeptSet(keys("a"), NOW - 100), KeptSet(keys("b"), NOW - 50)
    assert merge({BY_URI: older}, encode({BY_URI: newer}), NOW) is None
    assert merge({BY_URI: newer}, encode({BY_URI: older}), NOW) == encode({BY_URI: newer})
    assert merge({BY_URI: older}, encode({BY_ISSUER: newer}), NOW) == encode({BY_URI: older, BY_ISSUER: newer})


def test_the_same_keys_are_written_again_only_when_they_would_be_forgotten() -> None:
    before = encode({BY_URI: KeptSet(keys("a"), NOW - GRAIN)})
    assert merge({BY_URI: KeptSet(keys("a"), NOW)}, before, NOW) is None
    assert merge({BY_URI: KeptSet(keys("a"), NOW + 1)}, before, NOW + 1) is not None
    assert merge({}, before, NOW) is None
    assert merge({BY_URI: KeptSet(keys("b"), NOW - KEPT)}, None, NOW) is None


def test_of_more_than_there_is_room_for_those_that_were_fetched_last_are_kept() -> None:
    large = json.dumps({"keys": [{"kty": "RSA", "n": "1" * 100_000}]})
    sets = {KeySource(f"https://{number}.example.com/"): KeptSet(large, NOW - number) for number in range(20)}
    content = encode(sets)
    assert len(content) <= MAX_ARCHIVE
    assert sorted(kept.fetched for kept in decode(content, NOW).values()) == [NOW - number for number in (4, 3, 2, 1, 0)]


def test_a_file_is_for_its_owner_alone_and_not_believed_when_others_could_write_it(tmp_path: Path) -> None:
    async def main() -> None:
        archive = FileArchive(tmp_path)
        assert await archive.read() is None
        await archive.update(lambda content: b"one" if content is None else None)
        assert (await archive.read(), (tmp_path / FILE).stat().st_mode & 0o777) == (b"one", 0o600)
        await archive.update(lambda content: None)
        assert await archive.read() == b"one"
        (tmp_path / FILE).chmod(0o666)
        assert await archive.read() is None
        await archive.update(lambda content: b"two" if content is None else None)
        assert (await archive.read(), (tmp_path / FILE).stat().st_mode & 0o777) == (b"two", 0o600)

    trio.run(main)


def test_a_directory_that_cannot_be_written_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ArchiveFailed, match="key-sets"):
        trio.run(FileArchive(tmp_path / "gone").update, lambda content: b"one")


def in_cluster(check: Callable[[FakeApiServer, SecretArchive], Awaitable[None]]) -> None:
    async def main() -> None:
        server = FakeApiServer()
        async with trio.open_nursery() as nursery:
            access = await nursery.start(server.run_tcp)
            await check(server, SecretArchive(ApiClient(access), "istio-system"))
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_secret_is_made_and_changed() -> None:
    async def check(server: FakeApiServer, archive: SecretArchive) -> None:
        assert await archive.read() is None
        await archive.update(lambda content: b"one" if content is None else None)
        assert await archive.read() == b"one"
        await archive.update(lambda content: b"two" if content == b"one" else None)
        found = server.find("Secret", "istio-system", SECRET)
        assert found is not None
        assert base64.b64decode(found["data"][FILE]) == b"two"

    in_cluster(check)


def test_who_writes_a_secret_after_another_has_seen_what_that_one_wrote() -> None:
    async def check(server: FakeApiServer, archive: SecretArchive) -> None:
        await archive.update(lambda content: b"one")
        seen: list[bytes | None] = []

        def change(content: bytes | None) -> bytes:
            seen.append(content)
            if len(seen) == 1:
                data = {FILE: base64.b64encode(b"another's").decode()}
                server.put({"kind": "Secret", "metadata": {"name": SECRET, "namespace": "istio-system"}, "data": data})
            return b"ours"

        await archive.update(change)
        assert seen == [b"one", b"another's"]
        assert await archive.read() == b"ours"

    in_cluster(check)


def test_a_secret_that_holds_something_else_is_not_believed() -> None:
    async def check(server: FakeApiServer, archive: SecretArchive) -> None:
        for data in ({}, {FILE: "not base64!"}, {FILE: "schl\u00fcssel"}):
            server.put({"kind": "Secret", "metadata": {"name": SECRET, "namespace": "istio-system"}, "data": data})
            assert await archive.read() is None

    in_cluster(check)


def test_a_right_that_is_missing_is_a_failure_with_a_reason() -> None:
    async def check(server: FakeApiServer, archive: SecretArchive) -> None:
        server.faults.refusals.append((403, "Forbidden", {}))
        with pytest.raises(ArchiveFailed, match=f"{SECRET}.*Forbidden"):
            await archive.read()
        server.faults.refusals.extend([(404, "NotFound", {}), (403, "Forbidden", {})])
        with pytest.raises(ArchiveFailed, match=f"{SECRET}.*Forbidden"):
            await archive.update(lambda content: b"one")

    in_cluster(check)
