"""An explanation says what happens, and it is what happens."""

from __future__ import annotations

import pytest

from mesh.model.identity import SpiffeId
from mesh.model.l7.matching import Exact, PathKind, PathMatch, RouteMatch
from mesh.model.l7.policy import Attribute, AuthorizationPolicy, ExtAuthzHttp, PolicyAction, PolicyRule, Predicate
from mesh.model.l7.routing import Destination, DirectResponse, Fault, Forward, Origin, Retry, WeightedDestination
from mesh.model.l7.waypoint import Protocol
from tests.unit.waypoint_py.harness import CLIENT, HOST, VIP, Echo, World, default_route
from waypoint_py.explain import Explainer, InvalidQuestion, Question


def _ask(world: World, **query: str) -> dict[str, object]:
    asked = {"destination": str(VIP), "peer": str(CLIENT), **{name.replace("__", "."): value for name, value in query.items()}}
    plane = world.plane
    explainer = Explainer(plane.state, plane.store, plane.us(), plane.local.identity, plane.balancer, plane.reactor.now())
    return explainer.explain(Question.parse(asked))


def _step(answer: dict[str, object], name: str) -> dict[str, object]:
    steps = answer["steps"]
    assert isinstance(steps, list)
    (found,) = [step for step in steps if step["step"] == name]
    assert isinstance(found, dict)
    return found


def _rule(attribute: Attribute, value: str) -> PolicyRule:
    return PolicyRule(operations=((Predicate(attribute, texts=(Exact(value),)),),))


def _policy(name: str, action: PolicyAction, rule: PolicyRule, **more: object) -> AuthorizationPolicy:
    return AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", name), action, rules=(rule,), **more)


def test_each_decision_is_told_in_order_and_the_request_goes_the_same_way() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            short = default_route(
                matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, "/short")),), action=DirectResponse(299, b"x"), name="short"
            )
            slow = default_route(
                matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, "/slow")),),
                fault=Fault(status=418, abort_percent=2.5),
                timeout=3.0,
                retry=Retry(attempts=3, on=("5xx", "reset"), per_try_timeout=0.5),
            )
            world.describe(world.endpoint(address, "pod"), routes=[short, slow])
            world.push(
                _policy("deny-delete", PolicyAction.DENY, _rule(Attribute.METHOD, "DELETE")),
                _policy("allow-get", PolicyAction.ALLOW, _rule(Attribute.METHOD, "GET")),
                _policy("try-get", PolicyAction.DENY, _rule(Attribute.METHOD, "GET"), dry_run=True),
                _policy("audit", PolicyAction.AUDIT, _rule(Attribute.METHOD, "GET")),
                _policy(
                    "ask", PolicyAction.CUSTOM, _rule(Attribute.METHOD, "TRACE"), provider=ExtAuthzHttp("a", "b", 1), provider_name="p"
                ),
            )
            client = await world.client()
            for method, path, outcome, status in (
                ("GET", "/short/a/../b", "answered 299 by the route", 299),
                ("GET", "/slow", "forwarded", 200),
                ("GET", "/none", "answered 404: no route", 404),
                ("DELETE", "/short", "answered 403: policy", 403),
                ("PUT", "/short", "answered 403: policy", 403),
            ):
                answer = _ask(world, method=method, path=path)
                assert str(answer["outcome"]).startswith(outcome), answer
                assert (await client.get(path, method)).status == status
            answer = _ask(world, method="GET", path="/short/a/../b")
            assert _step(answer, "path")["path"] == "/short/b"
            assert _step(answer, "route")["name"] == "short"
            policies = _step(answer, "authorization")["policies"]
            assert isinstance(policies, list)
            matches = {str(each["policy"]).rpartition("/")[2]: each["matches"] for each in policies}
            assert matches == {"deny-delete": False, "allow-get": True, "try-get": True, "audit": True, "ask": False}
            told = _ask(world, method="GET", path="/slow")
            assert {name: _step(told, name)["because"] for name in ("fault", "timeout", "retry")} == {
                "fault": "2.5% end with status 418",
                "timeout": "3 s",
                "retry": "up to 3 on 5xx, reset; 0.5 s for each try",
            }
            assert _step(_ask(world, method="TRACE", path="/"), "custom")["because"]

    world.run(main)


def test_a_share_that_nobody_serves_is_no_request_forwarded() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            served, nobody = Destination("shop", HOST, 80), Destination("shop", HOST, 80, subset="v9")
            unusable = WeightedDestination(nobody, weight=1, fails_with=500, because="no such backend")
            only = default_route(
                action=Forward((WeightedDestination(nobody),)), matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, "/v9")),)
            )
            none = default_route(
                action=Forward((unusable, WeightedDestination(nobody))), matches=(RouteMatch(path=PathMatch(PathKind.PREFIX, "/none")),)
            )
            some = default_route(action=Forward((WeightedDestination(served, weight=3), unusable)))
            world.describe(world.endpoint(address, "pod"), routes=[only, none, some])
            client = await world.client()
            assert (await client.get("/v9")).status == 503
            lacking = f"no rule defines the subset 'v9' of shop/{HOST}"
            assert _ask(world, path="/v9")["outcome"] == f"answered 503: {lacking}"
            assert _ask(world, path="/none")["outcome"] == f"answered 500 or 503: no such backend; {lacking}"
            assert _ask(world, path="/")["outcome"] == "forwarded, but 1 of 4 are answered 500: no such backend"

    world.run(main)


def test_connections_that_are_not_let_in_are_told_why() -> None:
    world = World()

    async def main() -> None:
        world.describe()
        assert _ask(world, destination="10.96.0.200:80")["outcome"] == "CONNECT is answered 404"
        assert _ask(world, destination="127.0.0.1:15000")["outcome"] == "CONNECT is answered 403"
        assert _ask(world, destination="10.96.0.1:81")["outcome"] == "CONNECT is answered 503"
        stranger = SpiffeId("evil.example", "a", "b")
        assert _ask(world, peer=str(stranger))["outcome"] == "the connection is refused within TLS"
        assert str(_ask(world)["outcome"]).endswith("has no healthy endpoint") or "no" in str(_ask(world)["outcome"])
        world.configure(Protocol.TCP)
        assert _ask(world)["outcome"] == "carried to one of 1 destinations"
        world.push(_policy("deny", PolicyAction.DENY, PolicyRule()))
        assert _ask(world)["outcome"] == "the connection is reset: policy"
        assert _ask(world, destination=f"{HOST}:80")["outcome"] == "the connection is reset: policy"

    world.run(main)


@pytest.mark.parametrize(
    "query",
    [{}, {"destination": "x"}, {"destination": "1.2.3.4:80"}, {"destination": "1.2.3.4:80", "peer": "boss"}],
)
def test_a_question_that_is_none_is_told_what_lacks(query: dict[str, str]) -> None:
    with pytest.raises(InvalidQuestion):
        Question.parse(query)


@pytest.mark.parametrize("name", ["methods", "headers.x-user", "header", ""])
def test_a_parameter_that_is_none_is_refused_rather_than_left_out(name: str) -> None:
    with pytest.raises(InvalidQuestion, match=f"^{name}: no such parameter"):
        Question.parse({"destination": str(VIP), "peer": str(CLIENT), name: "POST"})
