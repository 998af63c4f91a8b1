"""Bytes in which two readers may see different requests: what we make of them, byte for byte (RFC 9112, RFC 9110 section 5).

One message for everybody: either it is refused, and nothing behind it is read, or it goes on in one spelling that nobody can doubt.
"""

from __future__ import annotations

import pytest

from mesh.http.h1 import MAX_CHUNK_LINE
from mesh.http.options import ServerOptions
from tests.unit.mesh.http.through import Through

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


def post(*fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Host: a", *fields, b"", body])


def get(target: bytes = b"/", *fields: bytes, host: bytes = b"Host: a") -> bytes:
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", host, *fields, b"", b""])


def sized(body: bytes, *fields: bytes) -> bytes:
    """A POST as it goes on."""
    return b"POST / HTTP/1.1\r\nhost: a\r\n" + b"".join(fields) + b"content-length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes, trailers: bytes = b"", fields: bytes = b"") -> bytes:
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST / HTTP/1.1\r\nhost: a\r\n" + fields + b"transfer-encoding: chunked\r\n\r\n" + pieces + b"0\r\n" + trailers + b"\r\n"


def plain(target: bytes = b"/", fields: bytes = b"", *, host: bytes = b"a", method: bytes = b"GET") -> bytes:
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b\r\n" % (method, target, host, fields)


FORWARDED_SMUGGLED = plain(b"/smuggled")
CHUNKED = b"Transfer-Encoding: chunked"

HEADS: list[tuple[str, bytes, int]] = [
    # The end of the message said twice.
    ("CL.TE", post(b"Content-Length: 6", CHUNKED, body=b"0\r\n\r\nG"), 400),
    ("TE.CL", post(CHUNKED, b"Content-Length: 4", body=b"5c\r\nGPOST / HTTP/1.1"), 400),
    ("two lengths", post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello!"), 400),
    ("two lengths in one", post(b"Content-Length: 5, 6", body=b"hello!"), 400),
    ("one length twice in one", post(b"Content-Length: 5, 5", body=b"hello"), 400),
    ("a length with a plus", post(b"Content-Length: +5", body=b"hello"), 400),
    ("a length with a minus", post(b"Content-Length: -5", body=b"hello"), 400),
    ("a length in hex", post(b"Content-Length: 0x5", body=b"hello"), 400),
    ("a length with a blank", post(b"Content-Length: 5 5", body=b"hello"), 400),
    ("a length with an underscore", post(b"Content-Length: 1_0", body=b"hello"), 400),
    ("a length of digits that are none", post("Content-Length: ٥".encode(), body=b"hello"), 400),
    ("no length", post(b"Content-Length:", body=b""), 400),
    ("a length beyond 64 bits", post(b"Content-Length: 18446744073709551621", body=b"hello"), 400),
    # Codings.
    ("chunked twice", post(CHUNKED, CHUNKED, body=b"0\r\n\r\n"), 501),
    ("chunked, chunked", post(b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 501),
    ("identity", post(b"Transfer-Encoding: identity", body=b""), 501),
    ("identity and chunked", post(b"Transfer-Encoding: identity", CHUNKED, body=b"0\r\n\r\n"), 501),
    ("gzip, chunked", post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501),
    ("chunked, gzip", post(b"Transfer-Encoding: chunked, gzip", body=b"0\r\n\r\n"), 501),
    ("xchunked", post(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"), 501),
    ("chunked with a parameter", post(b"Transfer-Encoding: chunked;q=1", body=b"0\r\n\r\n"), 501),
    ("chunked in quotes", post(b'Transfer-Encoding: "chunked"', body=b"0\r\n\r\n"), 501),
    ("chunked and a comma", post(b"Transfer-Encoding: chunked,", body=b"0\r\n\r\n"), 501),
    ("an empty coding", post(b"Transfer-Encoding:", body=b"0\r\n\r\n"), 501),
    ("vertical tab before chunked", post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n"), 400),
    ("form feed after chunked", post(b"Transfer-Encoding: chunked\x0c", body=b"0\r\n\r\n"), 400),
    ("NUL after chunked", post(b"Transfer-Encoding: chunked\0", body=b"0\r\n\r\n"), 400),
    ("folded coding", post(b"Transfer-Encoding:", b" chunked", body=b"0\r\n\r\n"), 400),
    ("a blank before the colon", post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"), 400),
    ("a tab before the colon", post(b"Transfer-Encoding\t: chunked", body=b"0\r\n\r\n"), 400),
    ("a blank before the name", post(b" Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    ("a coding in HTTP/1.0", post(CHUNKED, body=b"0\r\n\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"), 426),
    ("coding behind a bare CR", post(b"X: y\rTransfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    ("coding behind a bare LF", post(b"X: y\nTransfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    ("connection takes the length away", post(b"Connection: content-length", b"Content-Length: 5", body=b"hello"), 400),
    ("connection takes the host away", get(b"/", b"Connection: close, Host"), 400),
    # Line ends.
    ("bare LFs", b"GET / HTTP/1.1\nHost: a\n\n", 400),
    ("bare LF after the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("bare LF at the end", b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    ("bare CR at the end", b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", 400),
    ("CR CR LF", b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n", 400),
    ("an empty line first", b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("a folded line", get(b"/", b"X: y", b" z"), 400),
    ("a folded line with a colon", get(b"/", b"X: y", b"\tHost: b"), 400),
    ("a folded line after the request line", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    # Fields.
    ("NUL in a value", get(b"/", b"X: a\0b"), 400),
    ("DEL in a value", get(b"/", b"X: a\x7fb"), 400),
    ("NUL in a name", get(b"/", b"X\0: a"), 400),
    ("an empty name", get(b"/", b": a"), 400),
    ("no colon", get(b"/", b"Xa"), 400),
    ("a name in UTF-8", get(b"/", "Hëader: a".encode()), 400),
    ("a name with brackets", get(b"/", b"X(): a"), 400),
    ("a hundred and one fields", get(b"/", *[b"X: y"] * 100), 431),
    ("a head too large", get(b"/", b"X: " + b"y" * 61_440), 431),
    ("a target too large", get(b"/" + b"y" * 61_440), 431),
    ("a method too long", b"G" * 70_000 + b" / HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    ("a head without an end", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12_000, 431),
    # Hosts.
    ("two hosts", get(b"/", b"Host: b"), 400),
    ("one host twice", get(b"/", b"Host: a"), 400),
    ("no host", b"GET / HTTP/1.1\r\nX: y\r\n\r\n", 400),
    ("an empty host", get(host=b"Host:"), 400),
    ("a host with user information", get(host=b"Host: user@a"), 400),
    ("a host with a path", get(host=b"Host: a/b"), 400),
    ("a host with a blank", get(host=b"Host: a b"), 400),
    ("two hosts in one", get(host=b"Host: a, b"), 400),
    ("a port that is none", get(host=b"Host: a:80a"), 400),
    ("a port too large", get(host=b"Host: a:65536"), 400),
    ("absolute form without a host", b"GET http://a/ HTTP/1.1\r\n\r\n", 400),
    ("absolute form with user information", get(b"http://user@b/"), 400),
    ("absolute form without an authority", get(b"http:///x"), 400),
    ("absolute form of another scheme", get(b"ftp://a/"), 400),
    ("authority form", get(b"a:80"), 400),
    ("CONNECT", b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", 403),
    # Request lines.
    ("two blanks", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("a tab for a blank", b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("a blank in the target", b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("a blank at the end", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    ("a blank at the beginning", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("no version (HTTP/0.9)", b"GET /\r\n\r\n", 400),
    ("HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\n\r\n", 426),
    ("HTTP/1.2", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 400),
    ("http/1.1", b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("HTTP/01.1", b"GET / HTTP/01.1\r\nHost: a\r\n\r\n", 400),
    ("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("a method that is no token", b"GE(T) / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("* for GET", get(b"*"), 400),
    ("no target", b"GET HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("NUL in the target", get(b"/\0"), 400),
    ("NUL escaped in the target", get(b"/%00"), 400),
    ("UTF-8 in the target", get("/ä".encode()), 400),
    ("broken UTF-8 in the target", get(b"/\xc3("), 400),
    ("LF in the target", get(b"/\nX: y"), 400),
    ("an expectation that nobody knows", post(b"Expect: 200-ok", b"Content-Length: 1", body=b"x"), 417),
]


@pytest.mark.parametrize("cut", [1, 1 << 20])
@pytest.mark.parametrize(("raw", "status"), [row[1:] for row in HEADS], ids=[row[0] for row in HEADS])
def test_a_head_that_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(raw: bytes, status: int, cut: int) -> None:
    through = Through()
    through.feed(raw + SMUGGLED, cut)
    assert through.refused == [status]
    assert not through.forwarded
    assert through.closed
    assert through.answers.startswith(b"HTTP/1.1 %d " % status)
    assert through.answers.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in through.answers


BODIES: list[tuple[str, bytes]] = [
    ("a size with a plus", b"+5\r\nhello\r\n0\r\n\r\n"),
    ("a size with a minus", b"-5\r\nhello\r\n0\r\n\r\n"),
    ("a size with 0x", b"0x5\r\nhello\r\n0\r\n\r\n"),
    ("a size with an underscore", b"0_5\r\nhello\r\n0\r\n\r\n"),
    ("a blank before a size", b" 5\r\nhello\r\n0\r\n\r\n"),
    ("a blank after a size", b"5 \r\nhello\r\n0\r\n\r\n"),
    ("a blank before an extension", b"5 ;x\r\nhello\r\n0\r\n\r\n"),
    ("a tab after a size", b"5\t\r\nhello\r\n0\r\n\r\n"),
    ("no size", b"\r\nhello\r\n0\r\n\r\n"),
    ("no size but an extension", b";x=y\r\nhello\r\n0\r\n\r\n"),
    ("a size that is none", b"five!\r\nhello\r\n0\r\n\r\n"),
    ("a size beyond 64 bits", b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
    ("many noughts", b"0" * 16 + b"5\r\nhello\r\n0\r\n\r\n"),
    ("a size of digits that are none", "٥\r\nhello\r\n0\r\n\r\n".encode()),
    ("bare LF after a size", b"5\nhello\r\n0\r\n\r\n"),
    ("bare CR after a size", b"5\rhello\r\n0\r\n\r\n"),
    ("bare LF in an extension", b"5;x\ny\r\nhello\r\n0\r\n\r\n"),
    ("bare CR in an extension", b"5;x\ry\r\nhello\r\n0\r\n\r\n"),
    ("NUL in an extension", b"5;x\0\r\nhello\r\n0\r\n\r\n"),
    ("an endless extension", b"5;" + b"x" * MAX_CHUNK_LINE + b"\r\nhello\r\n0\r\n\r\n"),
    ("a chunk longer than its size", b"5\r\nhello!\r\n0\r\n\r\n"),
    ("a chunk shorter than its size", b"5\r\nhell\r\n0\r\n\r\n"),
    ("bare LF after a chunk", b"5\r\nhello\n0\r\n\r\n"),
    ("bare CR after a chunk", b"5\r\nhello\r0\r\n\r\n"),
    ("no line end after a chunk", b"5\r\nhello0\r\n\r\n"),
    ("bare LF after the last chunk", b"0\n\r\n"),
    ("bare LF for the end", b"0\r\n\n"),
    ("bare CR for the end", b"0\r\n\rX"),
    ("a request for the end", b"0\r\n" + SMUGGLED),
    ("trailers with a bare LF", b"0\r\nX: y\n\r\n"),
    ("trailers with NUL", b"0\r\nX: \0\r\n\r\n"),
    ("folded trailers", b"0\r\nX: y\r\n z\r\n\r\n"),
    ("trailers with a blank before the colon", b"0\r\nX : y\r\n\r\n"),
    ("trailers without a name", b"0\r\n: y\r\n\r\n"),
    ("too many trailers", b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n"),
    ("trailers too large", b"0\r\nX: " + b"y" * 61_440 + b"\r\n\r\n"),
]


@pytest.mark.parametrize("cut", [1, 1 << 20])
@pytest.mark.parametrize("body", [row[1] for row in BODIES], ids=[row[0] for row in BODIES])
def test_a_body_whose_end_can_be_read_in_two_ways_is_never_ended(body: bytes, cut: int) -> None:
    through = Through()
    through.feed(post(CHUNKED, body=body) + SMUGGLED, cut)
    (forwarded,) = through.forwarded
    assert not forwarded.whole
    assert not forwarded.raw.endswith(b"0\r\n\r\n")
    assert forwarded.body in (b"", b"h", b"hell\r", b"hello")
    assert through.closed
    assert through.answers == b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        post(CHUNKED, body=b"5\r\nhello\r\n0\r\n"),
        post(CHUNKED, body=b"5\r\nhello\r\n0\r\nX: y\r\n"),
        post(CHUNKED, body=b"5\r\nhello\r\n"),
        post(CHUNKED, body=b"5\r\nhel"),
        post(b"Content-Length: 6", body=b"hello"),
    ],
)
def test_a_body_that_breaks_off_is_never_ended(raw: bytes) -> None:
    through = Through()
    through.feed(raw)
    (forwarded,) = through.forwarded
    (lost,) = through.server.receive_eof()
    assert "closed" in getattr(lost, "reason", "")
    assert not forwarded.whole
    assert not forwarded.raw.endswith(b"0\r\n\r\n")
    assert through.closed


GRPC = b"content-type: application/grpc\r\n"
ACCEPTED: list[tuple[str, bytes, list[bytes]]] = [
    ("a length", post(b"Content-Length: 5", body=b"hello"), [sized(b"hello")]),
    ("one length twice", post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), [sized(b"hello")]),
    ("a length with noughts", post(b"Content-Length: 005", body=b"hello"), [sized(b"hello")]),
    ("a length with blanks around it", post(b"Content-Length: \t5 ", body=b"hello"), [sized(b"hello")]),
    ("a length of nought", post(b"Content-Length: 0"), [sized(b"")]),
    ("no body", post(), [sized(b"")]),
    ("a body of GET", get(b"/", b"Content-Length: 5") + b"hello", [plain(fields=b"content-length: 5\r\n") + b"hello"]),
    ("chunks", post(CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n"), [chunked(b"hello")]),
    ("CHUNKED with tabs around it", post(b"tRANSFER-eNCODING:\t CHUNKED \t", body=b"5\r\nhello\r\n0\r\n\r\n"), [chunked(b"hello")]),
    ("no chunk", post(CHUNKED, body=b"0\r\n\r\n"), [chunked()]),
    ("a last chunk of many noughts", post(CHUNKED, body=b"000;x\r\n\r\n"), [chunked()]),
    ("extensions", post(CHUNKED, body=b'5;x="0";y\r\nhello\r\n0;z\r\n\r\n'), [chunked(b"hello")]),
    ("noughts and capitals", post(CHUNKED, body=b"00A\r\n0123456789\r\n0\r\n\r\n"), [chunked(b"0123456789")]),
    ("a request in a chunk", post(CHUNKED, body=b"23\r\n" + SMUGGLED + b"\r\n0\r\n\r\n"), [chunked(SMUGGLED)]),
    ("a request for a body", post(b"Content-Length: 35", body=SMUGGLED), [sized(SMUGGLED)]),
    (
        "trailers that are framing",
        post(CHUNKED, body=b"0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nHost: b\r\nX: y\r\n\r\n"),
        [chunked()],
    ),
    (
        "trailers of gRPC",
        post(CHUNKED, b"Content-Type: application/grpc", body=b"0\r\nContent-Length: 5\r\nHost: b\r\nAuthorization: c\r\nX: y\r\n\r\n"),
        [chunked(trailers=b"x: y\r\n", fields=GRPC)],
    ),
    ("absolute form and another host", get(b"http://b:81/x?y"), [plain(b"/x?y", host=b"b:81")]),
    ("absolute form without a path", get(b"HTTPS://b?y"), [plain(b"/?y", host=b"b")]),
    ("a fragment", get(b"/a#/../b"), [plain(b"/a")]),
    ("OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", [plain(b"*", method=b"OPTIONS")]),
    ("a method in lower case", b"get / HTTP/1.1\r\nHost: a\r\n\r\n", [plain(method=b"get")]),
    ("a long method", b"X" * 1000 + b" / HTTP/1.1\r\nHost: a\r\n\r\n", [plain(method=b"X" * 1000)]),
    ("TRACE", b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", [plain(method=b"TRACE")]),
    ("escapes", get(b"/%ff%0a%0d%20"), [plain(b"/%ff%0a%0d%20")]),
    ("an address of IPv6", get(host=b"Host: [::1]:80"), [plain(host=b"[::1]:80")]),
    ("a value in no known encoding", get(b"/", b"X: \xff\xe4 "), [plain(fields=b"x: \xff\xe4\r\n")]),
    ("a value with a tab", get(b"/", b"X:a\tb"), [plain(fields=b"x: a\tb\r\n")]),
    ("an empty value", get(b"/", b"X:"), [plain(fields=b"x: \r\n")]),
    ("a hundred fields", get(b"/", *[b"X: y"] * 99), [plain(fields=b"x: y\r\n" * 99)]),
    (
        "what ends here",
        get(b"/", b"Connection: keep-alive, X", b"X: y", b"Keep-Alive: 5", b"Proxy-Connection: z", b"Z: 1"),
        [plain(fields=b"z: 1\r\n")],
    ),
    ("te", get(b"/", b"TE: gzip, Trailers"), [plain(fields=b"te: trailers\r\nconnection: te\r\n")]),
    ("an upgrade to what we do not know", get(b"/", b"Connection: upgrade", b"Upgrade: h2c", b"HTTP2-Settings: x"), [plain()]),
    ("an upgrade that connection does not name", get(b"/", b"Upgrade: websocket"), [plain()]),
    (
        "an upgrade of a request with a body",
        post(b"Connection: upgrade", b"Upgrade: websocket", b"Content-Length: 5", body=b"hello"),
        [sized(b"hello")],
    ),
    (
        "a body that is expected",
        post(b"Expect: 100-Continue", b"Content-Length: 1", body=b"x"),
        [b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\nexpect: 100-continue\r\n\r\nx"],
    ),
]


@pytest.mark.parametrize("cut", [1, 1 << 20])
@pytest.mark.parametrize(("raw", "forwarded"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_what_is_accepted_goes_on_in_one_spelling_and_so_does_what_follows(raw: bytes, forwarded: list[bytes], cut: int) -> None:
    through = Through()
    through.feed(raw + SMUGGLED, cut)
    assert not through.refused
    whole = [*forwarded, FORWARDED_SMUGGLED]
    spelt = _joined if cut == 1 else bytes
    assert [spelt(request.raw) for request in through.forwarded] == [spelt(raw) for raw in whole]
    assert through.answers == b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" * len(whole)
    assert not through.closed


def _joined(raw: bytes) -> bytes:
    """A request whose chunks, cut as the bytes came, are one."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in head:
        return raw
    body = b""
    while (size := int((line := rest.partition(b"\r\n"))[0], 16)) > 0:
        body += line[2][:size]
        rest = line[2][size + 2 :]
    return head + b"\r\n\r\n" + body + rest


def test_a_request_of_http10_goes_on_as_one_of_http11_where_it_is_taken() -> None:
    through = Through(ServerOptions(http10=True, default_host=b"a"))
    through.feed(b"POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello" + SMUGGLED)
    assert [request.raw for request in through.forwarded] == [sized(b"hello")]
    assert through.closed, "it did not ask for its connection to be kept"
    coded = Through(ServerOptions(http10=True, default_host=b"a"))
    coded.feed(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert (coded.refused, coded.forwarded) == ([400], [])
