"""Requests that wait for somebody else's word: authorizers in the mesh, and tokens."""

from __future__ import annotations

import json
import time

import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from mesh.model.address import NamespacedHostname, NetworkAddress, SocketAddress, parse_ip
from mesh.model.l7.matching import Exact, PathKind, PathMatch, Prefix
from mesh.model.l7.policy import (
    Attribute,
    AuthorizationPolicy,
    ExtAuthzGrpc,
    ExtAuthzHttp,
    JwtRule,
    PolicyAction,
    PolicyRule,
    Predicate,
    RequestAuthentication,
)
from mesh.model.l7.routing import Origin
from mesh.model.l7.waypoint import Protocol
from mesh.model.service import AppProtocol, Service, ServicePort
from mesh.rpc import Call, Unary, serve_connection
from mesh.state.store import Delta
from mesh.xds.proto import ext_authz_pb2 as pb
from tests.unit.waypoint_py.harness import HOST, Echo, Seen, World, default_route
from tests.unit.waypoint_py.test_client_hello import in_records
from waypoint_py.policy.consult import CHECK_METHOD
from waypoint_py.policy.ext_authz import ExtAuthz
from waypoint_py.verdict import Flag

AUTHZ = "authz.shop.svc.cluster.local"


def _announce(world: World, address: SocketAddress) -> None:
    """The authorizer, as a service of the mesh."""
    key = NamespacedHostname("shop", AUTHZ)
    service = Service("authz", "shop", AUTHZ, (NetworkAddress("", parse_ip("10.96.2.1")),), ports=(ServicePort(9000, address.port),))
    world.state.apply(Delta(services=(service,), workloads=(world.endpoint(address, "authz", services={key: ()}),)))


def _custom(provider: ExtAuthzHttp | ExtAuthzGrpc | None, *, path: str = "/guarded") -> AuthorizationPolicy:
    rule = PolicyRule(operations=((Predicate(Attribute.PATH, paths=(PathMatch(PathKind.PREFIX, path),)),),)) if path else PolicyRule()
    origin = Origin("AuthorizationPolicy", "shop", "custom")
    return AuthorizationPolicy(origin, PolicyAction.CUSTOM, rules=(rule,), provider=provider, provider_name="authz")


def test_an_authorizer_over_http_decides_and_changes_headers() -> None:
    world = World()

    def decide(seen: Seen) -> tuple[int, dict[str, str], bytes]:
        if seen.headers.get("x-key") == "good":
            return 200, {"x-user": "ann"}, b""
        return 401, {"www-authenticate": "key"}, b"who are you?"

    async def main() -> None:
        echo, authorizer = Echo(), Echo(decide)
        async with world.application(echo) as address, world.application(authorizer) as second:
            world.describe(world.endpoint(address))
            _announce(world, second)
            world.push(
                _custom(
                    ExtAuthzHttp(
                        "shop", AUTHZ, 9000, include_request_headers=("x-key",), headers_upstream_on_allow=("x-user",), timeout=5.0
                    )
                )
            )
            client = await world.client()
            assert (await client.get("/open")).status == 200
            assert not authorizer.seen
            denied = await client.get("/guarded", "POST", b"hello")
            assert (denied.status, denied.text, denied.headers["www-authenticate"]) == (401, "who are you?", "key")
            record = world.log.requests[-1]
            assert (record.flags, record.details) == ((Flag.UNAUTHORIZED_EXTERNAL_SERVICE,), "ext_authz_denied")
            allowed = await client.get("/guarded", "POST", b"hello", {"x-key": "good", "x-user": "boss"})
            assert allowed.text == "POST /guarded\nhello"
            assert echo.seen[-1].headers["x-user"] == "ann"
            assert authorizer.seen[-1].target == "/guarded"

    world.run(main)


@pytest.mark.parametrize("size", [0, 10, 5_000, 600_000])
@pytest.mark.parametrize("downstream", [1, 2])
def test_an_authorizer_sees_of_the_body_what_it_asks_for_and_the_application_all(downstream: int, size: int) -> None:
    world = World()

    async def main() -> None:
        echo, authorizer = Echo(), Echo(lambda seen: (200, {}, b""))
        async with world.application(echo) as address, world.application(authorizer) as second:
            world.describe(world.endpoint(address))
            _announce(world, second)
            limit = 400_000
            world.push(_custom(ExtAuthzHttp("shop", AUTHZ, 9000, max_request_bytes=limit, allow_partial_message=True, timeout=5.0)))
            body = bytes(range(250)) * (size // 250) + b"x" * (size % 250)
            if downstream == 1:
                answer = await (await world.client()).get("/guarded", "POST", body)
            else:
                answer = await (await world.h2_client()).get("/guarded", "POST", body)
            assert answer.body == b"POST /guarded\n" + body
            assert authorizer.seen[0].body == body[:limit]
            assert authorizer.seen[0].headers["x-envoy-auth-partial-body"] == ("true" if size > limit else "false")

    world.run(main)


@pytest.mark.parametrize(("allowed", "status"), [(True, 200), (False, 403)])
def test_a_client_that_waits_for_100_is_told_to_send_what_the_authorizer_wants_to_see(allowed: bool, status: int) -> None:
    world = World()

    async def main() -> None:
        echo, authorizer = Echo(), Echo(lambda seen: (200 if allowed else 403, {}, b""))
        async with world.application(echo) as address, world.application(authorizer) as second:
            world.describe(world.endpoint(address))
            _announce(world, second)
            world.push(_custom(ExtAuthzHttp("shop", AUTHZ, 9000, max_request_bytes=100, timeout=5.0)))
            stream = await world.open()
            await stream.send_all(b"POST /guarded HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
            await stream.send_all(b"hello")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 %d " % status)
            assert authorizer.seen[0].body == b"hello"
            assert [seen.headers.get("expect") for seen in echo.seen] == ([None] if allowed else [])

    world.run(main)


def test_a_body_that_the_authorizer_cannot_see_whole_is_too_large() -> None:
    world = World()

    async def main() -> None:
        echo, authorizer = Echo(), Echo(lambda seen: (200, {}, b""))
        async with world.application(echo) as address, world.application(authorizer) as second:
            world.describe(world.endpoint(address))
            _announce(world, second)
            world.push(_custom(ExtAuthzHttp("shop", AUTHZ, 9000, max_request_bytes=100, timeout=5.0)))
            client = await world.client()
            answer = await client.get("/guarded", "POST", b"x" * 101)
            assert (answer.status, answer.text) == (413, "Payload Too Large")
            assert not echo.seen
            assert not authorizer.seen

    world.run(main)


@pytest.mark.parametrize("fail_open", [True, False])
@pytest.mark.parametrize("kind", ["nobody", "silent", "unknown"])
def test_an_authorizer_that_does_not_answer_is_open_or_closed_as_configured(kind: str, fail_open: bool) -> None:
    world = World()

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with world.application(Echo()) as address, world.application(silent) as second:
            world.describe(world.endpoint(address))
            _announce(world, second if kind == "silent" else SocketAddress(second.ip, 9))
            hostname = "gone.shop.svc" if kind == "unknown" else AUTHZ
            world.push(_custom(ExtAuthzHttp("shop", hostname, 9000, timeout=0.1, fail_open=fail_open, status_on_error=504)))
            client = await world.client()
            answer = await client.get("/guarded")
            assert answer.status == (200 if fail_open else 504)
            if not fail_open:
                assert world.log.requests[0].details == "ext_authz_error"

    world.run(main)


def test_an_authorizer_over_grpc_decides() -> None:
    world = World()
    seen: list[pb.CheckRequest] = []

    async def check(body: bytes, call: Call) -> bytes:
        request = pb.CheckRequest.FromString(body)
        seen.append(request)
        answer = pb.CheckResponse()
        if request.attributes.request.http.path.startswith("/guarded/no"):
            answer.status.code = 7
            answer.denied_response.status.code = 402
            answer.denied_response.body = "pay"
        return answer.SerializeToString()

    async def authorizer(stream: trio.SocketStream) -> None:
        await serve_connection(stream, {CHECK_METHOD: Unary(check)})

    async def main() -> None:
        async with world.application(Echo()) as address, world.application(authorizer) as second:
            world.describe(world.endpoint(address))
            _announce(world, second)
            world.push(_custom(ExtAuthzGrpc("shop", AUTHZ, 9000, timeout=5.0)))
            client = await world.client()
            assert (await client.get("/guarded/yes")).status == 200
            answer = await client.get("/guarded/no")
            assert (answer.status, answer.text) == (402, "pay")
            assert seen[0].attributes.source.principal == "spiffe://cluster.local/ns/shop/sa/client"

    world.run(main)


@pytest.mark.parametrize("allows", [True, False])
def test_an_authorizer_decides_about_connections_too(allows: bool) -> None:
    world = World()

    async def check(body: bytes, call: Call) -> bytes:
        answer = pb.CheckResponse()
        answer.status.code = 0 if allows else 7
        return answer.SerializeToString()

    async def authorizer(stream: trio.SocketStream) -> None:
        await serve_connection(stream, {CHECK_METHOD: Unary(check)})

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def main() -> None:
        async with world.application(echo) as address, world.application(authorizer) as second:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            _announce(world, second)
            world.push(_custom(ExtAuthzGrpc("shop", AUTHZ, 9000, timeout=5.0), path=""))
            stream = await world.open()
            if allows:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
            else:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
                assert world.log.connections[0].details == "ext_authz_denied"

    world.run(main)


def test_a_client_that_goes_while_an_authorizer_thinks_is_told_of_once() -> None:
    world = World()

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def main() -> None:
        async with world.application(Echo()) as address, world.application(silent) as second:
            world.describe(world.endpoint(address))
            _announce(world, second)
            world.push(_custom(ExtAuthzHttp("shop", AUTHZ, 9000, timeout=60.0)))
            stream = await world.open()
            await stream.send_all(b"GET /guarded HTTP/1.1\r\nHost: a\r\n\r\n")
            await world.until(lambda: world.plane.counts.exchanges)
            await trio.sleep(0.05)
            await stream.aclose()
            await world.until(lambda: world.log.requests)
            assert world.log.requests[0].flags == (Flag.DOWNSTREAM_CONNECTION_TERMINATION,)

    world.run(main)


@pytest.mark.parametrize("protocol", [Protocol.HTTP, Protocol.TCP])
def test_a_defect_while_an_authorizer_is_asked_ends_what_waits_and_lets_nothing_through(
    monkeypatch: pytest.MonkeyPatch, protocol: Protocol
) -> None:
    world = World()

    async def broken(self: ExtAuthz, *args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(ExtAuthz, "_check", broken)

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=protocol)
            _announce(world, address)
            world.push(_custom(ExtAuthzGrpc("shop", AUTHZ, 9000, fail_open=True), path=""))
            if protocol is Protocol.HTTP:
                client = await world.client()
                assert (await client.get("/")).status == 500
            else:
                stream = await world.open()
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            assert not echo.seen
        assert [type(error) for error in world.errors] == [ZeroDivisionError]
        world.errors.clear()

    world.run(main)


# Tokens

KEY = ec.generate_private_key(ec.SECP256R1())
KEYS = json.dumps({"keys": [{**json.loads(ECAlgorithm.to_jwk(KEY.public_key())), "kid": "k", "alg": "ES256"}]})


def _token(key: ec.EllipticCurvePrivateKey = KEY, **changes: object) -> str:
    claims = {"iss": "issuer", "sub": "ann", "aud": "shop", "exp": time.time() + 60, "group": "staff", **changes}
    return jwt.encode(claims, key, "ES256", headers={"kid": "k"})


def test_a_token_is_proved_and_its_claims_are_routed_and_judged_by() -> None:
    world = World()

    async def main() -> None:
        from mesh.model.l7.matching import HeaderMatch, RouteMatch
        from mesh.model.l7.routing import DirectResponse

        echo = Echo()
        async with world.application(echo) as address:
            staff = default_route(
                matches=(RouteMatch(headers=(HeaderMatch("x-group", Exact("staff")),)),), action=DirectResponse(299, b"staff")
            )
            world.describe(world.endpoint(address), routes=[staff, default_route()])
            rule = JwtRule("issuer", audiences=("shop",), jwks=KEYS, claim_headers=(("x-group", "group"),))
            world.push(RequestAuthentication(Origin("RequestAuthentication", "shop", "jwt"), rules=(rule,)))
            client = await world.client()
            assert (await client.get("/", headers={"x-group": "staff"})).status == 200  # nobody may say it of himself
            assert (await client.get("/", headers={"authorization": f"Bearer {_token()}"})).status == 299
            other = await client.get("/", headers={"authorization": f"Bearer {_token(group='guests')}"})
            assert other.status == 200
            assert "authorization" not in echo.seen[-1].headers
            forged = await client.get("/", headers={"authorization": f"Bearer {_token(ec.generate_private_key(ec.SECP256R1()))}"})
            assert forged.status == 401
            assert forged.headers["www-authenticate"].startswith("Bearer ")
            assert (await client.get("/", headers={"authorization": f"Bearer {_token(exp=1)}"})).status == 401
            assert (await client.get("/", headers={"authorization": f"Bearer {_token(aud='bank')}"})).status == 403
            needs = PolicyRule(sources=((Predicate(Attribute.AUTH_PRINCIPAL, texts=(Prefix("issuer/"),)),),))
            world.push(AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "needs"), PolicyAction.ALLOW, rules=(needs,)))
            assert (await client.get("/")).status == 403
            assert (await client.get("/", headers={"authorization": f"Bearer {_token()}"})).status == 299

    world.run(main)


def test_a_token_that_proved_somebody_is_told_to_no_log_and_no_trace() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            world.push(RequestAuthentication(Origin("RequestAuthentication", "shop", "jwt"), rules=(JwtRule("issuer", jwks=KEYS),)))
            client = await world.client()
            assert (await client.get(f"/a?b=c&access_token={_token()}")).status == 200
            (record,) = world.log.requests
            assert record.path == b"/a?b=c"
            assert record.request_header(b":path") == b"/a?b=c"

    world.run(main)


def test_an_unreadable_request_authentication_denies() -> None:
    world = World()

    async def main() -> None:
        async with world.application(Echo()) as address:
            world.describe(world.endpoint(address))
            world.push(RequestAuthentication(Origin("RequestAuthentication", "shop", "jwt"), unreadable="gibberish"))
            client = await world.client()
            assert (await client.get("/")).status in (401, 403)

    world.run(main)


# Names in TLS


def _hello(name: str) -> bytes:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    connection = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


def test_a_policy_on_the_name_that_tls_asks_for_holds() -> None:
    world = World()

    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def main() -> None:
        from msgspec.structs import replace

        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP)
            (service,) = [each for each in world.state.services() if each.hostname == HOST]
            ports = (ServicePort(80, 8080, AppProtocol.TLS),)
            world.state.apply(Delta(services=(replace(service, ports=ports),)))
            rule = PolicyRule(conditions=(Predicate(Attribute.SNI, texts=(Exact("good.example"),)),))
            world.push(AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "sni"), PolicyAction.ALLOW, rules=(rule,)))
            good = _hello("good.example")
            stream = await world.open()
            for at in range(0, len(good), 100):
                await stream.send_all(good[at : at + 100])
            received = b""
            while len(received) < len(good):
                received += await stream.receive_some()
            assert received == good
            stream._stream.abort("enough")
            for first in (_hello("evil.example"), b"plain text\n"):
                stream = await world.open()
                await stream.send_all(first)
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            await world.until(lambda: len(world.log.connections) == 3)
            assert [record.requested_server_name for record in world.log.connections] == ["good.example", "evil.example", None]

    world.run(main)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("way", ["at once", "in records", "a few bytes first", "never whole"])
def test_a_deny_of_a_name_in_tls_is_not_got_round_by_how_the_hello_is_cut(
    declared: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("waypoint_py.listener.NAME_SECONDS", 0.2)
    world = World()
    heard: list[bytes] = []

    async def application(stream: trio.SocketStream) -> None:
        async for data in stream:
            heard.append(data)

    async def main() -> None:
        from msgspec.structs import replace

        async with world.application(application) as address:
            world.describe(world.endpoint(address), protocol=Protocol.TCP if declared else Protocol.AUTO)
            if declared:
                (service,) = [each for each in world.state.services() if each.hostname == HOST]
                ports = (ServicePort(80, 8080, AppProtocol.TLS),)
                world.state.apply(Delta(services=(replace(service, ports=ports),)))
            rule = PolicyRule(conditions=(Predicate(Attribute.SNI, texts=(Exact("secret.example"),)),))
            world.push(AuthorizationPolicy(Origin("AuthorizationPolicy", "shop", "sni"), PolicyAction.DENY, rules=(rule,)))
            hello = _hello("secret.example")
            pieces = {
                "at once": [hello],
                "in records": [in_records(hello, 60)],
                "a few bytes first": [hello[:8], hello[8:]],
                "never whole": [hello[:50]],
            }[way]
            stream = await world.open()
            for piece in pieces:
                await stream.send_all(piece)
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            (record,) = world.log.connections
            assert record.policy == "ns[shop]-policy[sni]-rule[0]"
            assert not heard

    world.run(main)


@pytest.mark.parametrize("first", [b"GET /guarded HTTP/1.0\r\n\r\n", b"\r\nGET /guarded HTTP/1.1\r\nhost: a\r\n\r\n"])
def test_an_authorizer_over_http_is_not_got_round_by_what_only_the_application_takes_for_http(first: bytes) -> None:
    world = World()

    async def main() -> None:
        echo = Echo()
        async with world.application(echo) as address:
            world.describe(world.endpoint(address), protocol=Protocol.AUTO)
            world.push(_custom(ExtAuthzHttp("shop", AUTHZ, 9000, timeout=5.0)))
            stream = await world.open()
            await stream.send_all(first)
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            assert not echo.seen
            assert "declare the port" in world.log.connections[0].because

    world.run(main)
