"""The path that the policies judged is the path that goes on and that is logged, however the client spells it."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mesh.http.h1 import Http1Client
from mesh.http.path import BadPath, normalise
from mesh.model.l7.matching import PathKind, PathMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Origin
from mesh.model.l7.waypoint import Assigned, PathNormalization, WaypointSettings
from mesh.state.store import Delta
from tests.unit.waypoint_py.stage import ROUTE, Stage

PLAIN = msgspec.structs.replace(ROUTE, fault=None, mirrors=(), retry=None)
NOT_ADMIN = AuthorizationPolicy(
    Origin("AuthorizationPolicy", "shop", "deny"),
    PolicyAction.DENY,
    rules=(PolicyRule(operations=((Predicate(Attribute.PATH, paths=(PathMatch(PathKind.PREFIX, "/admin"),)),),)),),
)
SPELLINGS = [
    b"/admin",
    b"admin",
    b"/%61dmin",
    b"%%361dmin",
    b"/.",
    b"/..",
    b"/%2e%2e",
    b"/..;x",
    b"//",
    b"/",
    b"%2f",
    b"\\",
    b"%5c",
    b"x",
    b"?",
    b"#",
]
paths = st.lists(st.sampled_from([*SPELLINGS, b"%", b'"', b"%00", b"%2561dmin", b"Admin"]), max_size=8).map(
    lambda pieces: b"/" + b"".join(pieces)
)


@given(paths, st.sampled_from(list(PathNormalization)))
def test_what_the_policies_saw_is_what_goes_on(path: bytes, how: PathNormalization) -> None:
    stage = Stage(1, serial=True, route=PLAIN)
    settings = WaypointSettings("shop", "waypoint", path_normalization=how)
    stage.plane.store.apply(Delta(l7=tuple(Assigned("shop/waypoint", each) for each in (settings, NOT_ADMIN))))
    stage.say(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    spelt = normalise(path, how)
    if isinstance(spelt, BadPath):
        assert stage.wire.out.startswith(b"HTTP/1.1 400 ")
        assert not stage.upstreams.calls
    elif spelt.startswith(b"/admin"):
        assert stage.wire.out.startswith(b"HTTP/1.1 403 ")
        assert not stage.upstreams.calls
    else:
        (call,) = stage.upstreams.living
        assert call.request.path == spelt
        upstream = Http1Client()
        upstream.send_request(call.request, ended=True)
        assert upstream.take_outgoing().startswith(b"GET " + spelt + b" HTTP/1.1\r\n")
    stage.finish()
    (record,) = stage.log.ended
    assert isinstance(spelt, BadPath) or record.path == spelt
