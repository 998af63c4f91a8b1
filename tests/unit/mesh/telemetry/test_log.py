import io
import json

import pytest
import structlog

from mesh.telemetry import log


@pytest.fixture
def stream():
    stream = io.StringIO()
    log.configure(stream=stream)
    yield stream
    log.configure()


def test_a_plain_line_has_time_level_scope_event_and_fields_between_tabs(stream):
    log.get_logger("xds").info("connected", address="10.0.0.1:15012", attempt=2, tls=True)
    when, level, scope, event, fields = stream.getvalue().rstrip("\n").split("\t")
    assert when.endswith("Z")
    assert len(when) == len("2026-01-01T00:00:00.000000Z")
    assert (level, scope, event) == ("info", "xds", "connected")
    assert fields == 'address="10.0.0.1:15012" attempt=2 tls=true'


def test_no_value_can_start_a_line_or_forge_a_field(stream):
    log.get_logger("xds").warning("nack", reason='x" level="error\n2026\tinfo\tfake\u2028\x1b[31m')
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.count("\t") == 4
    assert "\x1b" not in line
    assert "\u2028" not in line
    assert '\\"' in line


def test_the_scope_may_come_from_structlogs_own_get_logger(stream):
    structlog.get_logger("rpc.server").info("started")
    assert stream.getvalue().split("\t")[2:] == ["rpc.server", "started\n"]
    log.set_levels(log.LogLevels.parse("rpc=error"))
    structlog.get_logger("rpc.server").info("hidden")
    assert "hidden" not in stream.getvalue()


def test_json_lines_have_the_node_proxys_keys_and_unknown_types_become_text():
    stream = io.StringIO()
    log.configure(as_json=True, stream=stream)
    log.get_logger("ca", node="n1").error("refused", because=ValueError("no"))
    log.configure()
    parsed = json.loads(stream.getvalue())
    assert list(parsed)[:4] == ["level", "time", "scope", "message"]
    assert (parsed["level"], parsed["scope"], parsed["message"], parsed["node"], parsed["because"]) == (
        "error",
        "ca",
        "refused",
        "n1",
        "no",
    )


def test_an_exception_is_logged_with_its_traceback_in_one_line(stream):
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        log.get_logger("x").exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "RuntimeError: boom" in stream.getvalue()
    assert "\terror\t" in stream.getvalue()


def test_levels_are_set_by_scope_and_a_scope_covers_what_is_below_it():
    levels = log.LogLevels.parse("access=off,xds=debug,warn,xds.client=error")
    assert levels.threshold("access") == log.LEVELS["off"]
    assert levels.threshold("xds.server") == log.LEVELS["debug"]
    assert levels.threshold("xds.client") == log.LEVELS["error"]
    assert levels.threshold("xdsother") == log.LEVELS["warn"]
    assert str(log.LogLevels.parse(str(levels))) == str(levels)


def test_an_event_below_its_scopes_level_is_dropped_and_the_level_can_change_while_running(stream):
    logger = log.get_logger("xds")
    logger.debug("hidden")
    assert stream.getvalue() == ""
    assert not log.wants("xds", "debug")
    log.set_levels(log.LogLevels.parse("xds=debug"))
    logger.debug("seen")
    assert "seen" in stream.getvalue()


@pytest.mark.parametrize("text", ["loud", "access=loud", "=debug"])
def test_an_unknown_level_is_an_error_that_names_it(text):
    with pytest.raises(log.InvalidLogSettings, match="not a log level"):
        log.LogLevels.parse(text)


def test_the_environment_chooses_format_and_levels():
    log.configure_from({"LOG_FORMAT": "json", "RUST_LOG": "debug"})
    try:
        assert log.writes_json()
        assert log.current_levels().default == "debug"
        with pytest.raises(log.InvalidLogSettings, match="LOG_FORMAT"):
            log.configure_from({"LOG_FORMAT": "xml"})
    finally:
        log.configure()


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(28, "No space left on device")


def test_a_line_that_cannot_be_written_costs_nothing_but_itself():
    log.configure(stream=FullDisk())
    log.get_logger("disk").error("full", because="of something")
    log.configure()
