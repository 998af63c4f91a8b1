"""Where an application's answer ends, whatever it says of itself: bytes of one answer are never another's."""

from __future__ import annotations

import pytest

from mesh.http.codec import BodyData, BodyEnd, ResponseHead, StreamReset
from mesh.http.h1 import MAX_INFORMATIONAL, Http1Client
from mesh.http.message import Request
from mesh.wire.errors import ErrorCode

FAKE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfake"


def ask(method: bytes = b"GET", *, upgrade: bytes | None = None) -> Http1Client:
    client = Http1Client()
    request = Request(method, b"http", b"a", b"/", [], upgrade=upgrade)
    client.send_request(request, ended=upgrade is None)
    client.take_outgoing()
    return client


def hear(client: Http1Client, data: bytes, cut: int) -> tuple[list[object], bytes]:
    """Statuses, ends and flaws, and the body."""
    told: list[object] = []
    body = b""
    for at in range(0, len(data), cut):
        for event in client.receive(data[at : at + cut]):
            match event:
                case ResponseHead():
                    told.append((event.response.status, event.response.content_length, event.ended))
                case BodyData():
                    body += event.data
                case BodyEnd():
                    told.append("end")
                case StreamReset():
                    told.append((event.code, event.reason))
                case _:
                    raise AssertionError(event)
    return told, body


def refused(reason: str) -> tuple[ErrorCode, str]:
    return ErrorCode.PROTOCOL_ERROR, f"response: {reason}"


@pytest.mark.parametrize("cut", [1, 1 << 20])
@pytest.mark.parametrize(
    ("method", "answer", "told", "reusable"),
    [
        (b"GET", b"204 No Content\r\n\r\n", [(204, None, True)], True),
        (b"GET", b"204 No Content\r\nContent-Length: 0\r\n\r\n", [(204, None, True)], True),
        (b"GET", b"204 No Content\r\nContent-Length: 5\r\n\r\n", [refused("content-length in a response of 204")], False),
        (b"GET", b"204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", [refused("transfer-encoding in a response of 204")], False),
        (b"HEAD", b"204 No Content\r\nContent-Length: 5\r\n\r\n", [refused("content-length in a response of 204")], False),
        (b"GET", b"100 Continue\r\nContent-Length: 5\r\n\r\n", [refused("content-length in a response of 100")], False),
        (b"GET", b"103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n", [refused("transfer-encoding in a response of 103")], False),
        (b"GET", b"199 Whatever\r\nContent-Length: 1\r\n\r\n", [refused("content-length in a response of 199")], False),
        (b"GET", b"304 Not Modified\r\nContent-Length: 5\r\n\r\n", [(304, 5, True)], True),
        (b"GET", b"304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n", [(304, None, True)], True),
        (b"HEAD", b"200 OK\r\nContent-Length: 5\r\n\r\n", [(200, 5, True)], True),
        (b"HEAD", b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", [(200, None, True)], True),
        (b"HEAD", b"200 OK\r\n\r\n", [(200, None, True)], True),
        (b"GET", b"200 OK\r\nContent-Length: 0\r\n\r\n", [(200, 0, True)], True),
        (
            b"GET",
            b"101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
            [refused("101 without having been asked")],
            False,
        ),
    ],
)
def test_an_answer_without_a_body_ends_with_its_head(method: bytes, answer: bytes, told: list[object], reusable: bool, cut: int) -> None:
    client = ask(method)
    assert hear(client, b"HTTP/1.1 " + answer, cut) == (told, b"")
    assert client.reusable is reusable
    # What comes now was not asked for: it is nobody's, and nobody uses the connection any more.
    assert hear(client, FAKE, cut) == ([], b"")
    assert client.finished
    assert not client.reusable


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
    ],
)
def test_an_answer_with_more_behind_it_is_the_connections_last(answer: bytes) -> None:
    client = ask()
    told, body = hear(client, answer + FAKE, 1 << 20)
    assert len([each for each in told if isinstance(each, tuple)]) == 1
    assert body in (b"", b"body")
    assert not client.reusable
    assert not client.capacity


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", "transfer-encoding beside content-length"),
        (b"Content-Length: 5\r\nContent-Length: 6", "several content-lengths"),
        (b"Content-Length: +5", "invalid content-length"),
        (b"Content-Length: 0x5", "invalid content-length"),
        (b"Content-Length: " + b"9" * 19, "invalid content-length"),
        (b"Transfer-Encoding: gzip, chunked", "transfer-encoding other than chunked"),
        (b"Transfer-Encoding: identity", "transfer-encoding other than chunked"),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "transfer-encoding other than chunked"),
        (b"X : y", "invalid header name or folded line"),
        (b"X: y\r\n z", "header field without a name"),
        (b"X: y\n", "control character or bare line end in head"),
        (b"X: \0", "control character or bare line end in head"),
    ],
)
def test_an_answer_that_two_readers_could_read_differently_is_none(head: bytes, reason: str) -> None:
    client = ask()
    assert hear(client, b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\nhello", 1 << 20) == ([refused(reason)], b"")
    assert client.finished


def test_only_so_many_informational_answers_are_listened_to() -> None:
    client = ask()
    told, _ = hear(client, b"HTTP/1.1 103 Early Hints\r\n\r\n" * (MAX_INFORMATIONAL + 1), 1 << 20)
    assert told == [(103, None, False)] * MAX_INFORMATIONAL + [refused("too many informational responses")]


@pytest.mark.parametrize("cut", [1, 1 << 20])
def test_after_a_101_everything_is_the_other_protocols(cut: int) -> None:
    client = ask(upgrade=b"websocket")
    head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    assert hear(client, head + b"\r\n" + FAKE, cut) == ([(101, None, False)], FAKE)
    assert not client.reusable
    broken = ask(upgrade=b"websocket")
    assert hear(broken, head + b"Content-Length: 4\r\n\r\n" + FAKE, cut) == ([refused("content-length in a response of 101")], b"")
