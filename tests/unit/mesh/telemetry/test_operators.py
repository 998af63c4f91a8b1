"""Envoy's operators: what they print, and what is refused. The answers were compared with Envoy 1.40."""

from __future__ import annotations

import msgspec
import pytest

from mesh.http.message import Request
from mesh.model.address import SocketAddress, parse_ip
from mesh.telemetry.operators import (
    DEFAULT_JSON_FORMAT,
    DEFAULT_TEXT_FORMAT,
    FLAG_NAMES,
    InvalidFormat,
    compile_format,
    compile_header_value,
)
from tests.corpus.facts import Known, asked
from waypoint_py.verdict import Flag

MOMENT = 1795921281.810465
"""2026-11-29 03:01:21.810465 UTC, a Sunday."""

FULL = Known(
    asked("/a/b?c=d&c=e&empty=", ("user-agent", "curl/8"), ("x-two", "1"), ("x-two", "2"), ("x-request-id", "id-1"), method="POST"),
    [(b"x-envoy-upstream-service-time", b"3"), (b"content-type", b"text/plain")],
    [(b"grpc-message", b"done")],
    start_time=MOMENT,
    protocol="HTTP/1.1",
    upstream_protocol="HTTP/2",
    response_code=503,
    response_code_details="upstream_reset_before_response_started{connection termination}",
    response_flags=("UF", "URX"),
    connection_termination_details="rbac_access_denied_matched_policy[none]",
    upstream_transport_failure_reason="TLS_error: certificate verify failed",
    bytes_received=10,
    bytes_sent=20,
    duration=0.0159,
    request_duration=0.001,
    request_tx_duration=0.002,
    response_duration=0.0119,
    response_tx_duration=0.004,
    upstream_host=SocketAddress(parse_ip("10.0.0.1"), 8080),
    upstream_cluster="outbound|80|v1|reviews.shop.svc.cluster.local",
    upstream_local_address=SocketAddress(parse_ip("fd00::7"), 41000),
    upstream_attempts=3,
    downstream_local_address=SocketAddress(parse_ip("10.96.0.9"), 80),
    downstream_remote_address=SocketAddress(parse_ip("fd00::1"), 40000),
    downstream_direct_remote_address=SocketAddress(parse_ip("10.1.0.2"), 40001),
    requested_server_name="sni.example",
    route_name="default",
    hostname="waypoint-0",
    downstream_peer_uri_san="spiffe://cluster.local/ns/shop/sa/web",
    downstream_local_uri_san="spiffe://cluster.local/ns/shop/sa/waypoint",
    grpc_status=14,
    connection_id=7,
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
)
NOTHING = Known()


@pytest.mark.parametrize(
    ("text", "full", "nothing"),
    [
        ("%REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)% %REQ(:SCHEME)% %REQ(HOST)%", "POST /a/b?c=d&c=e&empty= b http b", "- - - - -"),
        ("%REQ(User-Agent)%", "curl/8", "-"),
        ("%REQ(X-TWO)%", "1", "-"),
        ("%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/a/b?c=d&c=e&empty=", "-"),
        ("%REQ(USER-AGENT?:PATH)%", "curl/8", "-"),
        ("%REQ(?X-TWO)%%REQ(X-TWO?)%", "11", "--"),
        ("%REQ(USER-AGENT):4% %REQ(NONE?USER-AGENT):2% %REQ(USER-AGENT):0%", "curl cu ", "- - -"),
        ("%RESP(content-type)% %RESP(NONE?CONTENT-TYPE):4% %RESP(none)%", "text/plain text -", "- - -"),
        ("%TRAILER(GRPC-MESSAGE)%", "done", "-"),
        ("%QUERY_PARAM(c)% %QUERY_PARAM(empty)% %QUERY_PARAM(d)%", "d  -", "- - -"),
        ("%PROTOCOL% %UPSTREAM_PROTOCOL%", "HTTP/1.1 HTTP/2", "- -"),
        ("%RESPONSE_CODE%", "503", "0"),
        ("%RESPONSE_CODE_DETAILS%", "upstream_reset_before_response_started{connection_termination}", "-"),
        ("%RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG%", "UF,URX UpstreamConnectionFailure,UpstreamRetryLimitExceeded", "- -"),
        ("%CONNECTION_TERMINATION_DETAILS%", "rbac_access_denied_matched_policy[none]", "-"),
        ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", "TLS_error: certificate verify failed", "-"),
        ("%BYTES_RECEIVED% %BYTES_SENT%", "10 20", "0 0"),
        ("%DURATION% %REQUEST_DURATION% %REQUEST_TX_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%", "15 1 2 11 4", "- - - - -"),
        ("%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS%", "10.0.0.1:8080 10.0.0.1:8080", "- -"),
        ("%UPSTREAM_CLUSTER% %UPSTREAM_CLUSTER_RAW%", " ".join(["outbound|80|v1|reviews.shop.svc.cluster.local"] * 2), "- -"),
        ("%UPSTREAM_LOCAL_ADDRESS% %UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %UPSTREAM_LOCAL_PORT%", "[fd00::7]:41000 fd00::7 41000", "- - -"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "3", "0"),
        (
            "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT%",
            "10.96.0.9:80 10.96.0.9 80",
            "- - -",
        ),
        ("%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "[fd00::1]:40000 fd00::1", "- -"),
        ("%DOWNSTREAM_REMOTE_PORT%", "40000", "-"),
        (
            "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_DIRECT_REMOTE_PORT%",
            "10.1.0.2:40001 10.1.0.2 40001",
            "- - -",
        ),
        ("%REQUESTED_SERVER_NAME% %ROUTE_NAME% %HOSTNAME%", "sni.example default waypoint-0", "- - -"),
        ("%DOWNSTREAM_PEER_URI_SAN%", "spiffe://cluster.local/ns/shop/sa/web", "-"),
        ("%DOWNSTREAM_LOCAL_URI_SAN%", "spiffe://cluster.local/ns/shop/sa/waypoint", "-"),
        ("%GRPC_STATUS% %GRPC_STATUS()% %GRPC_STATUS(CAMEL_STRING)%", "Unavailable Unavailable Unavailable", "- - -"),
        ("%GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS(NUMBER)% %GRPC_STATUS_NUMBER%", "UNAVAILABLE 14 14", "- - -"),
        ("%CONNECTION_ID% %TRACE_ID%", "7 4bf92f3577b34da6a3ce929d0e0e4736", "- -"),
        ("100%% of 50%%", "100% of 50%", "100% of 50%"),
        ("%%%RESPONSE_CODE%%%", "%503%", "%0%"),
        ("", "", ""),
        ("plain", "plain", "plain"),
        ("%START_TIME%", "2026-11-29T03:01:21.810Z", "1970-01-01T00:00:00.000Z"),
    ],
)
def test_an_operator_prints_what_is_known_and_a_dash_otherwise(text: str, full: str, nothing: str) -> None:
    compiled = compile_format(text)
    assert compiled.render(FULL) == full
    assert compiled.render(NOTHING) == nothing
    assert compiled.warnings == ()


@pytest.mark.parametrize(
    ("form", "printed"),
    [
        ("%Y/%m/%dT%H:%M:%S%z %s", "2026/11/29T03:01:21+0000 1795921281"),
        ("%3f %6f %1f %9f %f", "810 810465 8 810465000 810465000"),
        ("%b %e %j %Ez %Z %p %I %u %w", "Nov 29 333 +00:00 UTC AM 03 7 0"),
        ("%a %A %B %h %y %C %D %F %T %R", "Sun Sunday November Nov 26 20 11/29/26 2026-11-29 03:01:21 03:01"),
        ("%E3S %E*S %E*f %E4Y %E2f", "21.810 21.810465 810465 2026 81"),
        ("%c|%x|%X|%r", "Sun Nov 29 03:01:21 2026|11/29/26|03:01:21|03:01:21 AM"),
        ("%k %l %G %g %V", " 3  3 2026 26 48"),
        ("100%%, no directive", "100%, no directive"),
    ],
)
def test_the_start_time_can_be_written_in_any_form(form: str, printed: str) -> None:
    assert compile_format(f"%START_TIME({form})%").render(FULL) == printed


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("%REQ%", 0),
        ("ab %REQ()%", 3),
        ("%REQ(a?b?c)%", 0),
        ("%REQ(?)%", 0),
        ("%REQ(a b)%", 0),
        ("%REQ(x):%", 0),
        ("%REQ(x", 0),
        ("%PROTOCOL(x)%", 0),
        ("%PROTOCOL:3%", 0),
        ("%BYTES_SENT():3%", 0),
        ("%PROTOCOL% %FOO%", 11),
        ("% %", 0),
        ("100%", 3),
        ("%RESPONSE_CODE%%", 15),
        ("%req(x)%", 0),
        ("%START_TIME:4%", 0),
        ("%START_TIME(%Q)%", 0),
        ("%START_TIME(%)%", 0),
        ("%GRPC_STATUS(BAD)%", 0),
        ("%GRPC_STATUS:3%", 0),
        ("%FILTER_STATE%", 0),
        ("%DYNAMIC_METADATA()%", 0),
    ],
)
def test_a_format_that_envoy_would_not_take_is_refused_with_its_position(text: str, position: int) -> None:
    with pytest.raises(InvalidFormat) as refused:
        compile_format(text)
    assert refused.value.position == position


@pytest.mark.parametrize(
    "text", ["%FILTER_STATE(wasm.x:PLAIN)%", "%DYNAMIC_METADATA(a:b):10%", "%UPSTREAM_WIRE_BYTES_SENT%", "%DOWNSTREAM_PEER_CERT%"]
)
def test_an_operator_that_says_nothing_here_is_taken_with_a_warning(text: str) -> None:
    compiled = compile_format(text)
    assert compiled.render(FULL) == "-"
    assert len(compiled.warnings) == 1


def test_the_default_line_is_istios() -> None:
    assert compile_format(DEFAULT_TEXT_FORMAT).render(FULL) == (
        '[2026-11-29T03:01:21.810Z] "POST /a/b?c=d&c=e&empty= HTTP/1.1" 503 UF,URX '
        "upstream_reset_before_response_started{connection_termination} rbac_access_denied_matched_policy[none] "
        '"TLS_error: certificate verify failed" 10 20 15 3 "-" "curl/8" "id-1" "b" "10.0.0.1:8080" '
        "outbound|80|v1|reviews.shop.svc.cluster.local [fd00::7]:41000 10.96.0.9:80 [fd00::1]:40000 sni.example default\n"
    )


def test_a_json_log_keeps_numbers_numbers_and_what_is_missing_null() -> None:
    compiled = {key: compile_format(text) for key, text in DEFAULT_JSON_FORMAT.items()}
    full = {key: each.value(FULL) for key, each in compiled.items()}
    assert (full["response_code"], full["bytes_sent"], full["duration"], full["method"]) == (503, 20, 15, "POST")
    assert full["start_time"] == "2026-11-29T03:01:21.810Z"
    assert compiled["upstream_host"].value(NOTHING) is None
    assert compile_format("%RESPONSE_CODE%!").value(FULL) == "503!"
    assert compile_format("fixed").value(FULL) == "fixed"


def test_a_header_that_is_no_utf8_comes_back_as_it_was_and_does_not_break_json() -> None:
    facts = Known(Request(b"GET", b"http", b"b", b"/", [(b"x", b"caf\xe9"), (b"y", "Zürich".encode())]))
    rendered = compile_header_value("%REQ(x)%").render(facts)
    assert rendered.encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert msgspec.json.encode(compile_format("%REQ(x)%").value(facts)) == '"caf\ufffd"'.encode()
    assert compile_format("%REQ(y)%").value(facts) == "Zürich"


def test_a_value_cannot_end_a_quoted_field_or_start_a_line() -> None:
    facts = Known(Request(b"GET", b"http", b"b", b"/", [(b"x", b'a" 200 "\\\n\x00\xff\xc3\xbc')]))
    assert compile_format('"%REQ(x)%" %PROTOCOL%\n').render_line(facts) == '"a\\x22 200 \\x22\\x5c\\x0a\\x00\\xffü" -\n'
    assert compile_format("%RESPONSE_CODE% literal\n").render_line(facts) == "0 literal\n"


def test_a_line_has_what_the_format_has_in_its_order_whatever_is_read_together() -> None:
    facts = Known(asked("/p", ("x", "1"), ("y", "2"), ("x", "3")), protocol="HTTP/2", response_code=200)
    compiled = compile_format(
        "%REQ(y)% {%PROTOCOL%} {} {0} %REQ(none?x)% 100%% %REQ(x):3% %REQ(host)% %RESPONSE_CODE% %REQ(none)% %REQ(:path)%\n"
    )
    assert compiled.render_line(facts) == compiled.render(facts) == "2 {HTTP/2} {} {0} 1 100% 1 b 200 - /p\n"


def test_what_is_missing_is_left_out_of_a_header() -> None:
    assert compile_header_value("a%REQ(none)%b").render(NOTHING) == "ab"
    assert compile_header_value("%UPSTREAM_HOST%").render(NOTHING) == ""


def test_every_response_flag_has_a_long_name() -> None:
    assert {flag.value for flag in Flag} <= FLAG_NAMES.keys()


def test_what_decided_is_there_under_a_name_that_envoy_would_take():
    facts = Known(known={"because": "denied by it", "policy": "ns[a]-policy[b]"})
    assert compile_format("%DYNAMIC_METADATA(waypoint:because)%").render(facts) == "denied by it"
    assert compile_format("%DYNAMIC_METADATA(waypoint:because):6%").render(facts) == "denied"
    assert compile_format("%DYNAMIC_METADATA(waypoint:route)% %DYNAMIC_METADATA(waypoint:policy)%").render(facts) == "- ns[a]-policy[b]"
    assert not compile_format("%DYNAMIC_METADATA(waypoint:audit)%").warnings
    with pytest.raises(InvalidFormat, match="expected one of because, policy"):
        compile_format("%DYNAMIC_METADATA(waypoint:else)%")
