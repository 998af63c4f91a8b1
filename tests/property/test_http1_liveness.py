"""However requests, answers and reading interleave on a client's HTTP/1.1 connection: once nobody holds back, everything is answered.

The clock stands still: what only a timer would end has come to a halt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.http.message import Response
from mesh.model.l7.matching import Exact
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Origin
from mesh.model.l7.waypoint import Assigned
from mesh.state.store import Delta
from tests.unit.waypoint_py.stage import ROUTE, Call, Stage

PLAIN = msgspec.structs.replace(ROUTE, fault=None, mirrors=(), retry=None, timeout=None)
NO_PUT = AuthorizationPolicy(
    Origin("AuthorizationPolicy", "shop", "deny"),
    PolicyAction.DENY,
    rules=(PolicyRule(operations=((Predicate(Attribute.METHOD, texts=(Exact("PUT"),)),),)),),
)
SIZES = [0, 1, 100, 65_535, 65_536, 65_537, 262_143, 262_144, 262_145, 700_000]

sizes = st.sampled_from(SIZES)


@dataclass
class Asked:
    """One request, and how it will be answered. ``refused``: by ourselves."""

    method: bytes
    size: int
    chunk: int
    answer: int
    declared: bool
    expect: bool

    @property
    def raw(self) -> bytes:
        body = b"q" * self.size
        head = self.method + b" / HTTP/1.1\r\nHost: a\r\n" + b"Expect: 100-continue\r\n" * self.expect
        if not self.chunk:
            return head + b"Content-Length: %d\r\n\r\n" % self.size + body
        chunks = [body[at : at + self.chunk] for at in range(0, self.size, self.chunk)]
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + b"0\r\n\r\n"


asked = st.builds(
    Asked,
    st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT"]),
    sizes,
    st.sampled_from([0, 0, 5000, 70_000]),
    sizes,
    st.booleans(),
    st.sampled_from([False, False, True]),
)


@dataclass
class Play:
    """The client, which sends as fast as it may, and the applications, of which each answers what its request says."""

    requests: list[Asked]
    stage: Stage = field(default_factory=lambda: Stage(1, serial=True, route=PLAIN))
    said: int = 0
    heard: bytearray = field(default_factory=bytearray)
    answered: dict[int, int] = field(default_factory=dict)
    """Bytes of body given, by call."""

    def __post_init__(self) -> None:
        self.stage.plane.store.apply(Delta(l7=(Assigned("shop/waypoint", NO_PUT),)))
        self.bytes = b"".join(request.raw for request in self.requests)
        self.to_upstream = [request for request in self.requests if request.method != b"PUT"]

    def say(self, most: int) -> bool:
        wire = self.stage.wire
        if wire.paused or wire.ending or wire.over or self.said == len(self.bytes):
            return False
        piece = self.bytes[self.said : self.said + most]
        self.said += len(piece)
        self.stage.say(piece)
        return True

    def read(self, most: int) -> bool:
        data = self.stage.wire.read(most)
        self.heard += data
        self.stage.clock.turn()
        return bool(data)

    def upstream(self, most: int, *, early: bool) -> bool:
        """The application takes and gives so many bytes. ``early``: it may answer before it has heard all."""
        moved = False
        for number, call in enumerate(self.stage.upstreams.calls):
            if call.over:
                continue
            if not call.opened:
                call.opened = moved = True
                call.on_open(call)
                self.stage.clock.turn()
            if not call.ended and call.window < most:
                before = call.received
                call.window = most
                call.sink.writable()
                self.stage.clock.turn()
                moved = moved or call.received > before
            if not call.over and (call.ended or early):
                moved = self._answer(number, call, most) or moved
        return moved

    def _answer(self, number: int, call: Call, most: int) -> bool:
        request = self.to_upstream[number]
        size = 0 if request.method == b"HEAD" else request.answer
        if not call.responded:
            call.responded = True
            call.over = ended = request.method == b"HEAD" or (request.declared and not size)
            call.sink.response(Response(200, [], content_length=request.answer if request.declared else None), ended)
            self.stage.clock.turn()
            return True
        given = self.answered.get(number, 0)
        if given < size:
            if call.unconsumed > 300_000:
                return False
            piece = min(most, size - given)
            self.answered[number] = given + piece
            call.unconsumed += piece
            call.sink.data(b"a" * piece)
        else:
            call.over = True
            call.sink.complete([])
        self.stage.clock.turn()
        return True

    def answers(self) -> list[tuple[int, int]]:
        """Status and size of each, cut out of what was heard. A refused upload may have been ended with its connection."""
        found: list[tuple[int, int]] = []
        at, data = 0, bytes(self.heard)
        for request in self.requests:
            end = data.find(b"\r\n\r\n", at)
            if end < 0:
                break
            head, at = data[at:end], end + 4
            size = 0
            if request.method != b"HEAD" and b"transfer-encoding: chunked" in head:
                while (piece := int(data[at : (line := data.index(b"\r\n", at))], 16)) > 0:
                    size, at = size + piece, line + 2 + piece + 2
                at = line + 4
            elif request.method != b"HEAD":
                size = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                at += size
            found.append((int(head[9:12]), size))
        assert at == len(data)
        return found


@settings(max_examples=60)
@given(
    st.lists(asked, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 50, 5000, 65_536, 300_000])), max_size=25),
    st.booleans(),
)
def test_once_nobody_holds_back_everything_is_answered(requests: list[Asked], steps: list[tuple[int, int]], early: bool) -> None:
    play = Play(requests)
    for what, most in steps:
        if what < 2:
            play.say(most)
        elif what == 2:
            play.read(most)
        else:
            play.upstream(most, early=early)
    while play.say(100_000) | play.upstream(100_000, early=early) | play.read(100_000):
        pass
    wanted = [(403, 19) if request.method == b"PUT" else (200, request.answer) for request in requests]
    wanted = [(status, 0 if request.method == b"HEAD" else size) for request, (status, size) in zip(requests, wanted, strict=True)]
    answers = play.answers()
    assert answers == wanted[: len(answers)]
    if len(answers) < len(requests):  # the rest of an upload that nobody wanted ends the connection, and so does nothing else
        last = requests[len(answers) - 1]
        assert play.stage.wire.ending
        assert early or last.method == b"PUT"
        assert b"connection: close" in play.heard
    assert not play.stage.upstreams.living
    assert not play.stage.wire.paused
    play.stage.finish()
