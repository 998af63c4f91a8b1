"""What every request and response gets and loses."""

from __future__ import annotations

import random
import uuid

from mesh.http.message import Headers, Request, Response
from mesh.model.identity import SpiffeId
from waypoint_py.preparation import CONTROLS, date_of, finish_response, new_request_id, prepare

PEER = SpiffeId("cluster.local", "shop", "client")
US = SpiffeId("cluster.local", "shop", "waypoint")


def _prepared(headers: Headers, *, include_identity: bool = False) -> Request:
    request = Request(b"GET", b"https", b"a", b"/", headers)
    prepare(request, peer=PEER, us=US, include_identity=include_identity, rng=random.Random(1))
    return request


def test_request_ids_are_uuids_and_differ() -> None:
    rng = random.Random(1)
    made = {new_request_id(rng) for _ in range(100)}
    assert len(made) == 100
    for each in made:
        parsed = uuid.UUID(each.decode())
        assert (parsed.version, parsed.variant) == (4, uuid.RFC_4122)


def test_a_request_id_is_kept_and_an_empty_one_is_none() -> None:
    assert _prepared([(b"x-request-id", b"mine")]).find(b"x-request-id") == b"mine"
    made = _prepared([(b"x-request-id", b"")]).find(b"x-request-id")
    assert made is not None
    assert uuid.UUID(made.decode()).version == 4


def test_no_control_of_a_proxy_comes_from_a_client() -> None:
    request = _prepared([(name, b"1") for name in sorted(CONTROLS)] + [(b"x-envoy-peer-metadata", b"kept"), (b"x-other", b"kept")])
    assert {name for name, _ in request.headers} == {b"x-envoy-peer-metadata", b"x-other", b"x-request-id", b"x-forwarded-proto"}


def test_the_scheme_follows_what_is_forwarded() -> None:
    assert _prepared([]).scheme == b"http"
    assert _prepared([(b"x-forwarded-proto", b"https")]).scheme == b"https"
    odd = _prepared([(b"x-forwarded-proto", b"gopher")])
    assert (odd.scheme, odd.find(b"x-forwarded-proto")) == (b"https", b"gopher")


def test_nobody_says_of_himself_who_he_is() -> None:
    lies: Headers = [(b"x-forwarded-client-cert", b"URI=spiffe://a/ns/b/sa/boss"), (b"x-forwarded-client-cert", b"again")]
    assert _prepared(list(lies)).find(b"x-forwarded-client-cert") is None
    assert _prepared(list(lies), include_identity=True).find(b"x-forwarded-client-cert") == f"By={US};URI={PEER}".encode()


def test_a_response_says_that_it_came_through_us() -> None:
    response = Response(200, [(b"server", b"nginx"), (b"x-envoy-upstream-service-time", b"9"), (b"a", b"b")])
    finish_response(response, date_of(0), 0.0123)
    assert response.headers == [
        (b"a", b"b"),
        (b"date", b"Thu, 01 Jan 1970 00:00:00 GMT"),
        (b"x-envoy-upstream-service-time", b"12"),
        (b"server", b"istio-envoy"),
    ]
    ours = Response(404, [(b"date", b"then")])
    finish_response(ours, date_of(0), None)
    assert ours.headers == [(b"date", b"then"), (b"server", b"istio-envoy")]
