"""Lines of the access log: what they look like by default and as configured, and when they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.http.message import Response, Version
from mesh.model.address import SocketAddress
from mesh.model.identity import SpiffeId
from mesh.model.l7.routing import Destination
from mesh.model.l7.waypoint import AccessLogging
from mesh.telemetry.operators import DEFAULT_JSON_FORMAT, METADATA, Facts
from mesh.telemetry.output import LogOutput
from tests.unit.waypoint_py.telemetry.records import HOST, POD, connection, connection_record, endpoint, request_record
from waypoint_py.observer import RefusalRecord, RequestRecord
from waypoint_py.policy.authorize import DryRunVerdict, Judgement
from waypoint_py.telemetry.access_log import AccessLog, compile_lines
from waypoint_py.verdict import Flag

PEER = SpiffeId("cluster.local", "apps", "client")
ADDRESS = SocketAddress(ip_address("fd00::3"), 4711)


def rendered(facts: Facts, logging: AccessLogging | None = None) -> str:
    return compile_lines(logging or AccessLogging())[0](facts)


def denied() -> RequestRecord:
    record = request_record(status=403, method=b"POST", headers=[(b"x-forwarded-for", b"1.2.3.4")])
    record.add_flags(Flag.UNAUTHORIZED_EXTERNAL_SERVICE, Flag.DELAY_INJECTED)
    record.details = "rbac_access_denied_matched_policy[ns[shop]-policy[no posts]-rule[0]]"
    record.upstream = record.upstream_local_address = record.destination = None
    record.route = ""
    assert record.response is not None
    record.response.headers = []
    return record


def unread() -> RequestRecord:
    record = request_record(status=400)
    record.request = None
    record.method = record.path = record.authority = b""
    record.add_flags(Flag.DOWNSTREAM_PROTOCOL_ERROR)
    record.details = "http1.codec_error.a_bad_header"
    record.upstream = record.upstream_local_address = record.destination = None
    return record


def test_a_request_is_logged_as_istio_logs_it() -> None:
    assert rendered(request_record()) == (
        '[2026-11-29T03:01:21.810Z] "GET /a?b=c HTTP/1.1" 200 - via_upstream - "-" 7 2000 12 3 "-" "curl/8" "id-1" "web.shop" '
        '"10.1.0.2:8080" inbound-vip|80|http|web.shop.svc.cluster.local 10.1.0.9:50000 10.96.0.1:80 10.1.0.3:40000 - default\n'
    )


def test_a_denied_request_is_logged_as_istio_logs_it() -> None:
    assert rendered(denied()) == (
        '[2026-11-29T03:01:21.810Z] "POST /a?b=c HTTP/1.1" 403 UAEX,DI '
        'rbac_access_denied_matched_policy[ns[shop]-policy[no_posts]-rule[0]] - "-" 7 2000 12 - '
        '"1.2.3.4" "curl/8" "id-1" "web.shop" "-" - - 10.96.0.1:80 10.1.0.3:40000 - -\n'
    )


def test_a_request_that_could_not_be_read_is_logged() -> None:
    assert rendered(unread()).startswith('[2026-11-29T03:01:21.810Z] "- - HTTP/1.1" 400 DPE http1.codec_error.a_bad_header - "-" 7 ')


def test_a_connection_is_logged_as_istio_logs_it() -> None:
    record = connection_record()
    record.ended = 102.5
    record.server_name = "web.example"
    record.add_flags(Flag.UPSTREAM_CONNECTION_TERMINATION)
    assert rendered(record) == (
        '[2026-11-29T03:01:21.810Z] "- - -" 0 UC - - "-" 10 20 2500 - "-" "-" "-" "-" "10.1.0.2:8080" '
        "inbound-vip|80|tcp|web.shop.svc.cluster.local 10.1.0.9:50000 10.96.0.1:80 10.1.0.3:40000 web.example -\n"
    )


def test_a_refused_connect_is_logged_with_its_reason() -> None:
    record = RefusalRecord(1795921281.810465, PEER, ADDRESS, "10.96.0.9:80", 404, 'service "x" has no port 80')
    assert rendered(record) == (
        '[2026-11-29T03:01:21.810Z] "CONNECT - HTTP/2" 404 - service_\\x22x\\x22_has_no_port_80 - "-" 0 0 0 - "-" "-" "-" "10.96.0.9:80" '
        '"-" - - - [fd00::3]:4711 - -\n'
    )


def test_a_refused_handshake_is_logged_with_its_reason() -> None:
    record = RefusalRecord(1795921281.810465, None, ADDRESS, "", 0, "two URIs")
    assert rendered(record).startswith('[2026-11-29T03:01:21.810Z] "- - -" 0 - - two_URIs "-" 0 0 0 ')


@pytest.mark.parametrize("make", [request_record, denied, unread, connection_record], ids=lambda make: make.__name__)
def test_json_has_istios_keys_in_their_order(make: Callable[[], RequestRecord]) -> None:
    line = rendered(make(), AccessLogging(as_json=True))
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    assert list(json.loads(line)) == list(DEFAULT_JSON_FORMAT)


def test_json_has_numbers_as_numbers_and_what_is_missing_as_null() -> None:
    found = json.loads(rendered(denied(), AccessLogging(as_json=True)))
    assert (found["response_code"], found["bytes_sent"], found["duration"]) == (403, 2000, 12)
    assert (found["upstream_host"], found["route_name"], found["upstream_service_time"]) == (None, None, None)
    assert found["response_flags"] == "UAEX,DI"
    assert found["path"] == "/a?b=c"


def test_a_format_of_the_users_own_is_written() -> None:
    assert rendered(request_record(), AccessLogging(format="%REQ(:METHOD)% %RESPONSE_CODE% 100%% %TRACE_ID%\n")) == "GET 200 100% -\n"
    peer = AccessLogging(format="%DOWNSTREAM_PEER_URI_SAN% %HOSTNAME% %UPSTREAM_PROTOCOL%\n")
    assert rendered(request_record(), peer) == "spiffe://cluster.local/ns/apps/sa/client waypoint-1 HTTP/1.1\n"


def test_a_format_may_ask_what_decided() -> None:
    record = request_record(status=403)
    record.judged(Judgement("denied by it", "p", dry_run=(DryRunVerdict(True, "q", "dry-run: no"),), audited=("r", "s")))
    record.route_because = "HTTPRoute shop/web rule 0"
    logging = AccessLogging(as_json=True, json=tuple((key, f"%DYNAMIC_METADATA(waypoint:{key})%") for key in METADATA))
    assert json.loads(rendered(record, logging)) == {
        "because": "denied by it",
        "policy": "p",
        "route": "HTTPRoute shop/web rule 0",
        "dry_run": "dry-run: no",
        "audit": "r,s",
    }
    assert set(json.loads(rendered(connection_record(), logging)).values()) == {None}
    refused = json.loads(rendered(RefusalRecord(0.0, None, ADDRESS, "", 403, "two URIs"), logging))
    assert (refused["because"], refused["policy"]) == ("two URIs", None)


def test_a_format_without_a_newline_still_writes_lines() -> None:
    assert rendered(request_record(), AccessLogging(format="%RESPONSE_CODE%")) == "200\n"


def test_json_of_the_users_own_has_their_keys() -> None:
    keys = (("code", "%RESPONSE_CODE%"), ("who", "%REQ(:METHOD)% of %DOWNSTREAM_REMOTE_ADDRESS%"), ("fixed", "text"))
    logging = AccessLogging(as_json=True, json=keys)
    assert rendered(request_record(), logging) == '{"code":200,"who":"GET of 10.1.0.3:40000","fixed":"text"}\n'


def test_no_client_can_begin_a_line_or_end_a_field() -> None:
    nasty = request_record(headers=[(b"x-forwarded-for", b'a" 200 "\n[2026'), (b"x-two", b"\xff\x00")], path=b'/"\r\nb')
    line = rendered(nasty)
    assert line.count("\n") == 1
    assert line.count('"') == rendered(request_record()).count('"')
    assert json.loads(rendered(nasty, AccessLogging(as_json=True)))["x_forwarded_for"] == 'a" 200 "\n[2026'


_PLACES = [None, *(endpoint(replace(POD, uid=str(n), addresses=(ip_address(f"10.1.0.{n}"),))) for n in (4, 5))]
_SENT_FROM = [None, SocketAddress(ip_address("10.1.0.9"), 1), SocketAddress(ip_address("fd00::9"), 2)]
_DESTINATIONS = [None, Destination("shop", HOST, 80), Destination("shop", HOST, 80, "v1"), Destination("else", "other", 81)]
_FORMATS = [
    AccessLogging(),
    AccessLogging(format='%HOSTNAME%%ROUTE_NAME% \t"\\ %UPSTREAM_HOST%%REQ(X)%%UPSTREAM_CLUSTER% %DOWNSTREAM_PEER_URI_SAN% 100%%'),
    AccessLogging(format="%PROTOCOL%{%RESPONSE_FLAGS_LONG% %RESPONSE_CODE%} %REQ(X)%%RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS%"),
]
_OUTCOMES: list[dict[str, object]] = [
    {},
    {"response": Response(503, [])},
    {"response": None},
    {"flags": (Flag.UPSTREAM_OVERFLOW,)},
    {"details": 'a "b\n'},
    {"termination": "gone"},
    {"transport_failure": "TLS_error"},
    {"version": Version.HTTP_2},
]


_ROUTES = ["default", "", 'a"\nb', "\\"]
_VALUES = ["a", "", '"', "\\", "\n", "\x00", "ü", '\\x22"']


@given(changes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), min_size=4, max_size=20))
def test_a_line_does_not_depend_on_those_before_it_on_its_connection(changes: list[tuple[int, int]]) -> None:
    """One thing changes from line to line."""
    choices: tuple[Sequence[Any], ...] = (_FORMATS, _PLACES, _SENT_FROM, _DESTINATIONS, _ROUTES, _VALUES, _OUTCOMES)
    renders = [compile_lines(logging)[0] for logging in _FORMATS]
    facts = connection()
    numbers = [1] * len(choices)
    for which, number in changes:
        numbers[which] = number % len(choices[which])
        logging, upstream, sent_from, destination, route, value, outcome = (
            some[number] for some, number in zip(choices, numbers, strict=True)
        )
        render = renders[_FORMATS.index(logging)]
        found = []
        for each in (facts, connection()):
            record = request_record(each, [(b"x", value.encode()), (b"x-forwarded-for", value.encode())])
            record.upstream, record.upstream_local_address, record.destination = upstream, sent_from, destination
            record.route = route
            for name, what in outcome.items():
                setattr(record, name, what)
            found.append(render(record))
        assert found[0] == found[1]
        assert found[0].count("\n") == 1
        plain = render(request_record())
        assert found[0].count('"') == plain.count('"')
        assert found[0].replace("\\x", "").count("\\") == plain.count("\\")


def test_what_has_no_effect_in_a_format_is_told() -> None:
    for logging in (AccessLogging(format="%CONNECTION_ID% %STREAM_ID%"), AccessLogging(as_json=True, json=(("a", "%STREAM_ID%"),))):
        _, warnings = compile_lines(logging)
        assert len(warnings) == 1
        assert "STREAM_ID" in warnings[0]


class Written:
    """A log in a file, whose turns are taken by hand."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        self._path = path
        self.logging = AccessLogging(format="%RESPONSE_CODE%")
        self.wanted = True
        self.soon: list[Callable[[], None]] = []
        self.log = AccessLog(lambda: self.logging, LogOutput(self._fd), self.soon.append, wanted=lambda: self.wanted)

    def turn(self) -> None:
        soon, self.soon[:] = list(self.soon), []
        for call in soon:
            call()

    @property
    def lines(self) -> list[str]:
        self.turn()
        return self._path.read_text().splitlines()


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path / "log")


def test_lines_of_one_turn_leave_together(written: Written) -> None:
    written.log.write(request_record())
    written.log.write(request_record(status=404))
    assert len(written.soon) == 1
    assert written.lines == ["200", "404"]
    written.log.write(request_record(status=500))
    assert written.lines == ["200", "404", "500"]


def test_a_change_holds_from_the_next_line_on(written: Written) -> None:
    written.log.write(request_record())
    written.logging = AccessLogging(as_json=True, json=(("code", "%RESPONSE_CODE%"),))
    written.log.write(request_record())
    written.logging = AccessLogging(enabled=False)
    written.log.write(request_record())
    written.logging = AccessLogging(format="%BYTES_SENT%")
    written.log.write(request_record())
    assert written.lines == ["200", '{"code":200}', "2000"]


def test_a_log_that_is_switched_off_by_level_writes_nothing(written: Written) -> None:
    written.wanted = False
    written.log.write(request_record())
    assert written.lines == []


def test_a_format_that_cannot_be_read_is_replaced_by_the_default_one(written: Written) -> None:
    written.logging = AccessLogging(format="%NONSENSE%")
    written.log.write(request_record())
    written.log.write(request_record())
    assert [line.split('"')[1] for line in written.lines] == ["GET /a?b=c HTTP/1.1"] * 2
    written.logging = AccessLogging(as_json=True, json=(("a", "%REQ%"),))
    written.log.write(request_record())
    assert json.loads(written.lines[-1])["method"] == "GET"
    written.logging = AccessLogging(format="%RESPONSE_CODE%")
    written.log.write(request_record())
    assert written.lines[-1] == "200"
