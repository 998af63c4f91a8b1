"""Envoy's command operators (``%REQ(x)%``, ``%START_TIME%`` ...): texts with them, compiled once, rendered for every request.

One language for access log formats and for values of header changes, so that what a user wrote for Envoy means the same here. An operator
that Envoy does not have, or one used as Envoy would refuse it, is an `InvalidFormat`; one that Envoy has and that says nothing here is
taken, reported in `Format.warnings` and rendered as missing.

Header values are bytes; they are rendered as UTF-8 with ``surrogateescape``, so that ``text.encode("utf-8", "surrogateescape")`` gives them
back unchanged. Source of syntax and names: Envoy's access log documentation; details were compared with Envoy 1.40.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import Final, NamedTuple, Protocol, TypeAlias

from mesh.model.address import SocketAddress, ip_text, kept_text

MISSING: Final = "-"
"""What an access log prints for a value that there is not."""

DEFAULT_TEXT_FORMAT: Final = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% '
    "%RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "
    '"%UPSTREAM_TRANSPORT_FAILURE_REASON%" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% '
    '"%REQ(X-FORWARDED-FOR)%" "%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%" '
    "%UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% "
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)
"""Istio's access log."""

DEFAULT_JSON_FORMAT: Final[Mapping[str, str]] = {
    "start_time": "%START_TIME%",
    "route_name": "%ROUTE_NAME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
    "protocol": "%PROTOCOL%",
    "response_code": "%RESPONSE_CODE%",
    "response_flags": "%RESPONSE_FLAGS%",
    "response_code_details": "%RESPONSE_CODE_DETAILS%",
    "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
    "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration": "%DURATION%",
    "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
    "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
    "user_agent": "%REQ(USER-AGENT)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "authority": "%REQ(:AUTHORITY)%",
    "upstream_host": "%UPSTREAM_HOST%",
    "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
    "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
    "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
    "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "requested_server_name": "%REQUESTED_SERVER_NAME%",
}
"""Istio's access log as JSON: key and operator, in the order in which they are written."""

FLAG_NAMES: Final[Mapping[str, str]] = {
    "DC": "DownstreamConnectionTermination",
    "LH": "FailedLocalHealthCheck",
    "UH": "NoHealthyUpstream",
    "UT": "UpstreamRequestTimeout",
    "LR": "LocalReset",
    "UR": "UpstreamRemoteReset",
    "UF": "UpstreamConnectionFailure",
    "UC": "UpstreamConnectionTermination",
    "UO": "UpstreamOverflow",
    "URX": "UpstreamRetryLimitExceeded",
    "NR": "NoRouteFound",
    "DI": "DelayInjected",
    "FI": "FaultInjected",
    "RL": "RateLimited",
    "UAEX": "UnauthorizedExternalService",
    "RLSE": "RateLimitServiceError",
    "SI": "StreamIdleTimeout",
    "IH": "InvalidEnvoyRequestHeaders",
    "DPE": "DownstreamProtocolError",
    "UPE": "UpstreamProtocolError",
    "UMSDR": "UpstreamMaxStreamDurationReached",
    "RFCF": "ResponseFromCacheFilter",
    "NFCF": "NoFilterConfigFound",
    "DT": "DurationTimeout",
    "NC": "NoClusterFound",
    "OM": "OverloadManagerTerminated",
    "DF": "DnsResolutionFailed",
    "DO": "DropOverload",
}
"""Long names of response flags (`%RESPONSE_FLAGS_LONG%`)."""

NAMESPACE: Final = "waypoint"
METADATA: Final = ("because", "policy", "route", "dry_run", "audit")
"""Keys of ``%DYNAMIC_METADATA(waypoint:KEY)%``: what decided about a request, for which Envoy has no operator. Other filters' metadata says
nothing here."""

_GRPC_NAMES: Final = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
]
_GRPC_SNAKE: Final = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]


class Facts(Protocol):
    """What operators can say about a request; None (or an empty text) where there is nothing to say, or not yet.

    Times are seconds: ``start_time`` Unix time, the others since it. Headers are asked by lower-case name; ``:method``, ``:path``,
    ``:authority`` and ``:scheme`` are headers here. Addresses are what a log prints, ports included.
    """

    def request_header(self, name: bytes) -> bytes | None:
        """The first value. Of a header that was changed on the way: as it stands when it is asked."""

    def request_headers(self) -> Mapping[bytes, bytes]:
        """All that `request_header` may be asked for, for who asks for many, when nothing changes any more."""

    def response_header(self, name: bytes) -> bytes | None: ...

    def response_trailer(self, name: bytes) -> bytes | None: ...

    def metadata(self, key: str) -> str | None:
        """What decided, by the keys of `METADATA`."""

    def steady(self, render: Callable[[Facts], str]) -> str:
        """What ``render`` makes of this, which may be what it made of other facts whose ends and route were the same objects and that ended
        in the same way: it asks for operators of `_STEADY` alone."""

    @property
    def start_time(self) -> float: ...
    @property
    def protocol(self) -> str | None:
        """``HTTP/1.1``, ``HTTP/2``; None for TCP."""

    @property
    def upstream_protocol(self) -> str | None: ...
    @property
    def response_code(self) -> int | None: ...
    @property
    def response_code_details(self) -> str | None: ...
    @property
    def response_flags(self) -> Sequence[str]:
        """Short names, in the order in which they came."""

    @property
    def connection_termination_details(self) -> str | None: ...
    @property
    def upstream_transport_failure_reason(self) -> str | None: ...
    @property
    def bytes_received(self) -> int:
        """Of the request's body (TCP: of the client)."""

    @property
    def bytes_sent(self) -> int: ...
    @property
    def duration(self) -> float | None:
        """To the last byte of the response (or of the connection)."""

    @property
    def request_duration(self) -> float | None:
        """To the last byte of the request from the client."""

    @property
    def request_tx_duration(self) -> float | None:
        """To the last byte of the request to the upstream."""

    @property
    def response_duration(self) -> float | None:
        """To the first byte of the response from the upstream."""

    @property
    def response_tx_duration(self) -> float | None:
        """From the first byte of the response from the upstream to the last byte to the client."""

    @property
    def upstream_host(self) -> SocketAddress | None:
        """The endpoint's address."""

    @property
    def upstream_cluster(self) -> str | None:
        """``outbound|80|v1|reviews.shop.svc.cluster.local``."""

    @property
    def upstream_local_address(self) -> SocketAddress | None: ...
    @property
    def upstream_attempts(self) -> int:
        """Tries that were begun; 0: none."""

    @property
    def downstream_local_address(self) -> SocketAddress | None: ...
    @property
    def downstream_remote_address(self) -> SocketAddress | None:
        """The client, as trusted headers and tunnels tell."""

    @property
    def downstream_direct_remote_address(self) -> SocketAddress | None:
        """The other end of the connection itself."""

    @property
    def requested_server_name(self) -> str | None:
        """SNI."""

    @property
    def route_name(self) -> str | None: ...
    @property
    def hostname(self) -> str | None:
        """Of this proxy."""

    @property
    def downstream_peer_uri_san(self) -> str | None: ...
    @property
    def downstream_local_uri_san(self) -> str | None: ...
    @property
    def grpc_status(self) -> int | None: ...
    @property
    def connection_id(self) -> int | None: ...
    @property
    def trace_id(self) -> str | None: ...


class InvalidFormat(ValueError):
    """The text is no format of Envoy's. ``position``: of the character where it goes wrong, from 0."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(f"{reason} (at character {position})")
        self.reason = reason
        self.position = position


Value: TypeAlias = str | int | None
_Reader: TypeAlias = Callable[[Facts], Value]


class Format:
    """A compiled format. ``warnings``: operators that always render as missing, and why."""

    __slots__ = (
        "_backslashes",
        "_line_alternatives",
        "_line_body",
        "_line_headers",
        "_line_readers",
        "_line_template",
        "_missing",
        "_parts",
        "_quotes",
        "_readers",
        "_template",
        "text",
        "warnings",
    )

    def __init__(self, text: str, parts: tuple[str | _Reader, ...], missing: str, warnings: tuple[str, ...]) -> None:
        self.text = text
        self.warnings = warnings
        self._parts = parts
        self._missing = missing
        # One formatting in C for all of it: a line of the access log has two dozen operators, and every request has a line.
        self._readers, self._template = _split(parts)
        self._line_readers, headers, self._line_template = _split_line(_grouped(parts, missing))
        self._line_headers = [header.name for header in headers]
        self._line_alternatives = [(place, header.alternative) for place, header in enumerate(headers) if header.alternative is not None]
        literal = "".join([part for part in parts if isinstance(part, str)])
        self._quotes, self._backslashes = literal.count('"'), literal.count("\\")
        self._line_body = slice(None, -1 if parts and isinstance(parts[-1], str) and parts[-1].endswith("\n") else None)

    @property
    def literal(self) -> str | None:
        """The text that it always renders as, if it has no operators."""
        return None if self._readers else self._template % ()

    def render(self, facts: Facts) -> str:
        """The text, with every operator's value as it is."""
        missing = self._missing
        values = [read(facts) for read in self._readers]
        return self._template % tuple([missing if value is None else value for value in values])

    def render_line(self, facts: Facts) -> str:
        """The same for a log of lines: in values, which others choose, quotes, backslashes and what does not print are ``\\x22`` and
        the like, so that no value can end a quoted field or start a line."""
        missing = self._missing
        values = [value if (value := read(facts)) is not None else missing for read in self._line_readers]
        if self._line_headers:
            find = facts.request_headers().get
            found = list(map(find, self._line_headers))
            for place, alternative in self._line_alternatives:
                if found[place] is None:
                    found[place] = find(alternative)
            values += [missing if text is None else text.decode("utf-8", "surrogateescape") for text in found]
        line = self._line_template.format(*values)
        # The line has as many quotes and backslashes as the format itself: then no value has any.
        if line.count('"') == self._quotes and line.count("\\") == self._backslashes and line[self._line_body].isprintable():
            return line
        raw = [read(facts) for read in self._readers]
        return self._template % tuple([missing if value is None else _harmless(value) for value in raw])

    def value(self, facts: Facts) -> Value:
        """For JSON: a lone operator's value with its type, None if there is none; otherwise the text. What is not UTF-8 is replaced."""
        part = self._parts[0] if len(self._parts) == 1 else ""
        value = self.render(facts) if isinstance(part, str) else part(facts)
        if isinstance(value, str) and not value.isascii():
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return value


def _split(parts: Sequence[str | _Reader]) -> tuple[list[_Reader], str]:
    readers = [part for part in parts if not isinstance(part, str)]
    return readers, "".join([part.replace("%", "%%") if isinstance(part, str) else "%s" for part in parts])


def _split_line(parts: Sequence[str | _Reader]) -> tuple[list[_Reader], list[_RequestHeader], str]:
    """As `_split`, with headers of the request apart, which are found together: a template of `str.format`, for the values of the readers
    and then those of the headers."""
    headers = [part for part in parts if isinstance(part, _RequestHeader) and part.length is None]
    readers = [part for part in parts if not isinstance(part, str) and part not in headers]
    places = {id(part): f"{{{place}}}" for place, part in enumerate((*readers, *headers))}
    template = [part.replace("{", "{{").replace("}", "}}") if isinstance(part, str) else places[id(part)] for part in parts]
    return readers, headers, "".join(template)


def _grouped(parts: Sequence[str | _Reader], missing: str) -> list[str | _Reader]:
    """Neighbours among operators of `_STEADY`, and the texts between them, as one that renders them for a line: most requests have the same
    ends as others before, and end as they did."""
    found: list[str | _Reader] = []
    run: list[str | _Reader] = []
    for part in (*parts, None):
        if part is not None and (isinstance(part, str) or part in _STEADY):
            run.append(part)
            continue
        found += run if sum(not isinstance(each, str) for each in run) < 2 else [_group(run, missing)]
        run = []
        if part is not None:
            found.append(part)
    return found


def _group(parts: Sequence[str | _Reader], missing: str) -> _Reader:
    readers, template = _split(parts)

    def render(facts: Facts) -> str:
        values = [read(facts) for read in readers]
        return template % tuple([missing if value is None else _harmless(value) for value in values])

    return lambda facts: facts.steady(render)


def compile_format(text: str, missing: str = MISSING) -> Format:
    """A format for `Format.render`. ``missing`` stands for values that there are not. Raises InvalidFormat."""
    parts: list[str | _Reader] = []
    warnings: list[str] = []
    literal = ""
    position = 0
    while position < len(text):
        percent = text.find("%", position)
        if percent < 0:
            literal += text[position:]
            break
        literal += text[position:percent]
        if text.startswith("%%", percent):
            literal += "%"
            position = percent + 2
            continue
        command = _parse_command(text, percent)
        if literal:
            parts.append(literal)
            literal = ""
        parts.append(_reader(command, warnings))
        position = command.end
    if literal:
        parts.append(literal)
    return Format(text, tuple(parts), missing, tuple(warnings))


def compile_header_value(text: str) -> Format:
    """The format of a header's value: what is missing is left out. Raises InvalidFormat."""
    return compile_format(text, missing="")


class _Command(NamedTuple):
    name: str
    argument: str | None
    length: int | None
    position: int
    end: int


_COMMAND: Final = re.compile(r"%([A-Z0-9_]+)(?:\(([^)]*)\))?(?::([0-9]{1,9}))?%")


def _parse_command(text: str, position: int) -> _Command:
    found = _COMMAND.match(text, position)
    if found is None:
        raise InvalidFormat("a % begins neither %% nor an operator like %REQ(NAME)%", position)
    length = None if found[3] is None else int(found[3])
    return _Command(found[1], found[2] or None, length, position, found.end())


def _reader(command: _Command, warnings: list[str]) -> _Reader:
    if (plain := _PLAIN.get(command.name)) is not None:
        _no_argument(command)
        return plain
    if (make := _WITH_ARGUMENT.get(command.name)) is not None:
        return make(command)
    if command.name == "DYNAMIC_METADATA" and (command.argument or "").startswith(f"{NAMESPACE}:"):
        return _own_metadata(command)
    if command.name in _SILENT or command.name.startswith(_SILENT_PREFIXES):
        if command.name in _SILENT_WITH_ARGUMENT and command.argument is None:
            raise InvalidFormat(f"%{command.name}% needs an argument", command.position)
        warnings.append(f"%{command.name}% says nothing here: rendered as missing")
        return _nothing
    raise InvalidFormat(f"unknown operator %{command.name}%", command.position)


def _no_argument(command: _Command) -> None:
    if command.argument is not None:
        raise InvalidFormat(f"%{command.name}% takes no argument", command.position)
    if command.length is not None:
        raise InvalidFormat(f"%{command.name}% takes no length", command.position)


def _nothing(facts: Facts) -> None:
    return None


# Headers -------------------------------------------------------------------------------------------------------------------------------


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _header_names(command: _Command) -> tuple[bytes, bytes | None]:
    """The header and the one instead of it. ``host`` is ``:authority``."""
    if not command.argument:
        raise InvalidFormat(f"%{command.name}% needs the name of a header", command.position)
    names = command.argument.lower().split("?")
    if len(names) > 2:
        raise InvalidFormat(f"%{command.name}% takes one alternative header, not {len(names) - 1}", command.position)
    names = [name for name in names if name]
    if not names:
        raise InvalidFormat(f"%{command.name}% needs the name of a header", command.position)
    for name in names:
        if not _HEADER_NAME.fullmatch(name):
            raise InvalidFormat(f"not a header's name: {name!r}", command.position)
    encoded = [b":authority" if name == "host" else name.encode() for name in names]
    return encoded[0], encoded[1] if len(encoded) == 2 else None


_HEADER_NAME: Final = re.compile(r":?[!#$%&'*+.^_`|~0-9a-z-]+")


class _RequestHeader:
    """The reader of ``%REQ(name?alternative):length%``."""

    __slots__ = ("alternative", "length", "name")

    def __init__(self, command: _Command) -> None:
        self.name, self.alternative = _header_names(command)
        self.length = command.length

    def __call__(self, facts: Facts) -> str | None:
        value = facts.request_header(self.name)
        if value is None and self.alternative is not None:
            value = facts.request_header(self.alternative)
        return None if value is None else _text(value[: self.length])


def _header_reader(get: Callable[[Facts], Callable[[bytes], bytes | None]]) -> Callable[[_Command], _Reader]:
    def make(command: _Command) -> _Reader:
        name, alternative = _header_names(command)
        length = command.length

        def read(facts: Facts) -> str | None:
            find = get(facts)
            value = find(name)
            if value is None and alternative is not None:
                value = find(alternative)
            if value is None:
                return None
            return (value if length is None else value[:length]).decode("utf-8", "surrogateescape")

        return read

    return make


def _query_parameter(command: _Command) -> _Reader:
    if not command.argument:
        raise InvalidFormat(f"%{command.name}% needs the name of a parameter", command.position)
    prefix = command.argument.encode() + b"="
    length = command.length

    def read(facts: Facts) -> str | None:
        path = facts.request_header(b":path") or b""
        for pair in path.partition(b"?")[2].split(b"&"):
            if pair.startswith(prefix):
                return _text(pair[len(prefix) :][:length])
        return None

    return read


def _own_metadata(command: _Command) -> _Reader:
    key = (command.argument or "").removeprefix(f"{NAMESPACE}:")
    length = command.length
    if key not in METADATA:
        raise InvalidFormat(f"%{command.name}% has no key {key!r}: expected one of {', '.join(METADATA)}", command.position)

    def read(facts: Facts) -> str | None:
        value = facts.metadata(key)
        return value[:length] if value else None

    return read


# Times ---------------------------------------------------------------------------------------------------------------------------------


def _start_time(command: _Command) -> _Reader:
    if command.length is not None:
        raise InvalidFormat("%START_TIME% takes no length", command.position)
    if not command.argument:
        return lambda facts: _rfc3339(facts.start_time)
    parts = _compile_time(command.argument, command.position)
    return lambda facts: _render_time(parts, facts.start_time)


def _rfc3339(seconds: float) -> str:
    """``2026-01-02T03:04:05.678Z``, the milliseconds cut off rather than rounded."""
    millis = int(seconds * 1000)
    return f"{_second(millis // 1000)}.{millis % 1000:03}Z"


@lru_cache(maxsize=16)
def _second(seconds: int) -> str:
    """Requests come many to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


_MONTHS: Final = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
_DAYS: Final = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

# In English whatever the locale, in UTC.
_DIRECTIVES: dict[str, Callable[[datetime], str]] = {
    "Y": lambda t: str(t.year),
    "y": lambda t: f"{t.year % 100:02}",
    "C": lambda t: f"{t.year // 100:02}",
    "m": lambda t: f"{t.month:02}",
    "d": lambda t: f"{t.day:02}",
    "e": lambda t: f"{t.day:2}",
    "j": lambda t: f"{t.timetuple().tm_yday:03}",
    "H": lambda t: f"{t.hour:02}",
    "I": lambda t: f"{(t.hour - 1) % 12 + 1:02}",
    "M": lambda t: f"{t.minute:02}",
    "S": lambda t: f"{t.second:02}",
    "p": lambda t: "AM" if t.hour < 12 else "PM",
    "a": lambda t: _DAYS[t.weekday()][:3],
    "A": lambda t: _DAYS[t.weekday()],
    "b": lambda t: _MONTHS[t.month - 1][:3],
    "h": lambda t: _MONTHS[t.month - 1][:3],
    "B": lambda t: _MONTHS[t.month - 1],
    "u": lambda t: str(t.isoweekday()),
    "w": lambda t: str(t.isoweekday() % 7),
    "F": lambda t: f"{t.year}-{t.month:02}-{t.day:02}",
    "T": lambda t: f"{t.hour:02}:{t.minute:02}:{t.second:02}",
    "R": lambda t: f"{t.hour:02}:{t.minute:02}",
    "D": lambda t: f"{t.month:02}/{t.day:02}/{t.year % 100:02}",
    "z": lambda t: "+0000",
    "Ez": lambda t: "+00:00",
    "Z": lambda t: "UTC",
    "k": lambda t: f"{t.hour:2}",
    "l": lambda t: f"{(t.hour - 1) % 12 + 1:2}",
    "r": lambda t: f"{(t.hour - 1) % 12 + 1:02}:{t.minute:02}:{t.second:02} {'AM' if t.hour < 12 else 'PM'}",
    "c": lambda t: f"{_DAYS[t.weekday()][:3]} {_MONTHS[t.month - 1][:3]} {t.day:2} {t.hour:02}:{t.minute:02}:{t.second:02} {t.year}",
    "x": lambda t: f"{t.month:02}/{t.day:02}/{t.year % 100:02}",
    "X": lambda t: f"{t.hour:02}:{t.minute:02}:{t.second:02}",
    "G": lambda t: str(t.isocalendar().year),
    "g": lambda t: f"{t.isocalendar().year % 100:02}",
    "V": lambda t: f"{t.isocalendar().week:02}",
    "U": lambda t: t.strftime("%U"),
    "W": lambda t: t.strftime("%W"),
    "%": lambda t: "%",
    "E4Y": lambda t: f"{t.year:04}",
    "E*S": lambda t: f"{t.second:02}.{t.microsecond:06}".rstrip("0").rstrip("."),
    "E*f": lambda t: f"{t.microsecond:06}".rstrip("0") or "0",
}


def _fraction(digits: int, seconds: bool) -> Callable[[datetime], str]:
    def render(moment: datetime) -> str:
        fraction = f"{moment.microsecond:06}000"[:digits]
        return f"{moment.second:02}.{fraction}" if seconds else fraction

    return render


_DIRECTIVES |= {f"E{digits}{'S' if seconds else 'f'}": _fraction(digits, seconds) for digits in range(1, 10) for seconds in (True, False)}
_DIRECTIVE: Final = re.compile(r"%(?:([1-9])?f|(s)|(Ez|E4Y|E[1-9*][Sf]|[A-Za-z%]))")

_TimePart: TypeAlias = str | int | Callable[[datetime], str]
"""A text, the digits of a fraction (0: Unix seconds), or a directive."""


def _compile_time(argument: str, position: int) -> tuple[_TimePart, ...]:
    parts: list[_TimePart] = []
    at = 0
    while at < len(argument):
        percent = argument.find("%", at)
        if percent < 0:
            parts.append(argument[at:])
            break
        if percent > at:
            parts.append(argument[at:percent])
        found = _DIRECTIVE.match(argument, percent)
        if found is None or (found[3] is not None and found[3] not in _DIRECTIVES):
            raise InvalidFormat(f"unknown in a time's format: {argument[percent : percent + 2]!r}", position)
        if found[3] is not None:
            parts.append(_DIRECTIVES[found[3]])
        else:
            parts.append(0 if found[2] else int(found[1] or 9))
        at = found.end()
    return tuple(parts)


def _render_time(parts: tuple[_TimePart, ...], seconds: float) -> str:
    nanos = int(seconds * 1_000_000) * 1000  # a float has no nanoseconds
    moment = datetime.fromtimestamp(nanos // 1_000_000_000, UTC).replace(microsecond=nanos // 1000 % 1_000_000)
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, int):
            texts.append(f"{nanos % 1_000_000_000:09}"[:part] if part else str(nanos // 1_000_000_000))
        else:
            texts.append(part(moment))
    return "".join(texts)


def _millis(get: Callable[[Facts], float | None]) -> _Reader:
    def read(facts: Facts) -> int | None:
        seconds = get(facts)
        return None if seconds is None else int(seconds * 1000)

    return read


# Everything else -----------------------------------------------------------------------------------------------------------------------


def _flags(facts: Facts) -> str | None:
    return ",".join(facts.response_flags) or None


def _flags_long(facts: Facts) -> str | None:
    return ",".join([FLAG_NAMES.get(flag, flag) for flag in facts.response_flags]) or None


def _details(facts: Facts) -> str | None:
    # Blanks would make one field two: Envoy prints underscores too.
    text = facts.response_code_details
    return text.replace(" ", "_") if text else None


def _termination_details(facts: Facts) -> str | None:
    text = facts.connection_termination_details
    return text.replace(" ", "_") if text else None


def _grpc_status(command: _Command) -> _Reader:
    if command.length is not None:
        raise InvalidFormat("%GRPC_STATUS% takes no length", command.position)
    form = command.argument or "CAMEL_STRING"
    if form == "NUMBER":
        return lambda facts: facts.grpc_status
    if form not in ("CAMEL_STRING", "SNAKE_STRING"):
        raise InvalidFormat("%GRPC_STATUS% takes CAMEL_STRING, SNAKE_STRING or NUMBER", command.position)
    names = _GRPC_NAMES if form == "CAMEL_STRING" else _GRPC_SNAKE

    def read(facts: Facts) -> str | None:
        status = facts.grpc_status
        if status is None:
            return None
        return names[status] if 0 <= status < len(names) else str(status)

    return read


def _address(get: Callable[[Facts], SocketAddress | None]) -> _Reader:
    text = kept_text(1024)  # a connection and an endpoint keep their addresses

    def read(facts: Facts) -> str | None:
        address = get(facts)
        return None if address is None else text(address)

    return read


def _ip(get: Callable[[Facts], SocketAddress | None]) -> _Reader:
    def read(facts: Facts) -> str | None:
        address = get(facts)
        return None if address is None else ip_text(address.ip)

    return read


def _port(get: Callable[[Facts], SocketAddress | None]) -> _Reader:
    def read(facts: Facts) -> int | None:
        address = get(facts)
        return None if address is None else address.port

    return read


def _ends() -> dict[str, _Reader]:
    """Operators of addresses, in their three forms."""
    ends: dict[str, Callable[[Facts], SocketAddress | None]] = {
        "UPSTREAM_LOCAL": attrgetter("upstream_local_address"),
        "UPSTREAM_REMOTE": attrgetter("upstream_host"),
        "DOWNSTREAM_LOCAL": attrgetter("downstream_local_address"),
        "DOWNSTREAM_DIRECT_LOCAL": attrgetter("downstream_local_address"),
        "DOWNSTREAM_REMOTE": attrgetter("downstream_remote_address"),
        "DOWNSTREAM_DIRECT_REMOTE": attrgetter("downstream_direct_remote_address"),
    }
    found: dict[str, _Reader] = {}
    for name, get in ends.items():
        found[f"{name}_ADDRESS"] = _address(get)
        found[f"{name}_ADDRESS_WITHOUT_PORT"] = _ip(get)
        found[f"{name}_PORT"] = _port(get)
    return found


_PLAIN: Final[Mapping[str, _Reader]] = {
    "PROTOCOL": lambda facts: facts.protocol or None,
    "UPSTREAM_PROTOCOL": lambda facts: facts.upstream_protocol or None,
    # A request that was never answered has the code 0 in Envoy's log.
    "RESPONSE_CODE": lambda facts: facts.response_code or 0,
    "RESPONSE_CODE_DETAILS": _details,
    "RESPONSE_FLAGS": _flags,
    "RESPONSE_FLAGS_LONG": _flags_long,
    "CONNECTION_TERMINATION_DETAILS": _termination_details,
    "UPSTREAM_TRANSPORT_FAILURE_REASON": lambda facts: facts.upstream_transport_failure_reason or None,
    "BYTES_RECEIVED": attrgetter("bytes_received"),  # where there is nothing to be done with what is there: no call of Python's
    "BYTES_SENT": attrgetter("bytes_sent"),
    "DURATION": _millis(attrgetter("duration")),
    "REQUEST_DURATION": _millis(attrgetter("request_duration")),
    "REQUEST_TX_DURATION": _millis(attrgetter("request_tx_duration")),
    "RESPONSE_DURATION": _millis(attrgetter("response_duration")),
    "RESPONSE_TX_DURATION": _millis(attrgetter("response_tx_duration")),
    "UPSTREAM_HOST": _address(attrgetter("upstream_host")),
    "UPSTREAM_CLUSTER": lambda facts: facts.upstream_cluster or None,
    "UPSTREAM_CLUSTER_RAW": lambda facts: facts.upstream_cluster or None,
    "UPSTREAM_REQUEST_ATTEMPT_COUNT": lambda facts: facts.upstream_attempts,
    "REQUESTED_SERVER_NAME": lambda facts: facts.requested_server_name or None,
    "ROUTE_NAME": lambda facts: facts.route_name or None,
    "HOSTNAME": lambda facts: facts.hostname or None,
    "DOWNSTREAM_PEER_URI_SAN": lambda facts: facts.downstream_peer_uri_san or None,
    "DOWNSTREAM_LOCAL_URI_SAN": lambda facts: facts.downstream_local_uri_san or None,
    "GRPC_STATUS_NUMBER": lambda facts: facts.grpc_status,
    "CONNECTION_ID": lambda facts: facts.connection_id,
    "TRACE_ID": lambda facts: facts.trace_id or None,
    **_ends(),
}

_STEADY: Final = frozenset(
    [
        *(_PLAIN[name] for name in _ends()),
        *(
            _PLAIN[name]
            for name in (
                "UPSTREAM_HOST",
                "UPSTREAM_CLUSTER",
                "UPSTREAM_CLUSTER_RAW",
                "REQUESTED_SERVER_NAME",
                "ROUTE_NAME",
                "HOSTNAME",
                "DOWNSTREAM_PEER_URI_SAN",
                "DOWNSTREAM_LOCAL_URI_SAN",
                "PROTOCOL",
                "RESPONSE_CODE",
                "RESPONSE_CODE_DETAILS",
                "RESPONSE_FLAGS",
                "RESPONSE_FLAGS_LONG",
                "CONNECTION_TERMINATION_DETAILS",
                "UPSTREAM_TRANSPORT_FAILURE_REASON",
            )
        ),
    ]
)
"""Operators that say the same of all requests between the same ends on the same route that ended in the same way."""

_WITH_ARGUMENT: Final[Mapping[str, Callable[[_Command], _Reader]]] = {
    "REQ": _RequestHeader,
    "RESP": _header_reader(attrgetter("response_header")),
    "TRAILER": _header_reader(attrgetter("response_trailer")),
    "QUERY_PARAM": _query_parameter,
    "START_TIME": _start_time,
    "GRPC_STATUS": _grpc_status,
}

_SILENT: Final = frozenset(
    [
        "FILTER_STATE",
        "UPSTREAM_FILTER_STATE",
        "DYNAMIC_METADATA",
        "CLUSTER_METADATA",
        "UPSTREAM_METADATA",
        "ENVIRONMENT",
        "COMMON_DURATION",
        "CUSTOM_FLAGS",
        "START_TIME_LOCAL",
        "EMIT_TIME",
        "EMIT_TIME_LOCAL",
        "STREAM_ID",
        "UNIQUE_ID",
        "ROUNDTRIP_DURATION",
        "BYTES_RETRANSMITTED",
        "PACKETS_RETRANSMITTED",
        "REQUEST_HEADERS_BYTES",
        "RESPONSE_HEADERS_BYTES",
        "RESPONSE_TRAILERS_BYTES",
        "VIRTUAL_CLUSTER_NAME",
        "FILTER_CHAIN_NAME",
        "ACCESS_LOG_TYPE",
        "LOCAL_REPLY_BODY",
        "UPSTREAM_HOST_NAME",
        "UPSTREAM_HOST_NAME_WITHOUT_PORT",
        "UPSTREAM_CONNECTION_ID",
        "UPSTREAM_DETECTED_CLOSE_TYPE",
        "UPSTREAM_CONNECTION_POOL_READY_DURATION",
        "UPSTREAM_TLS_CIPHER",
        "UPSTREAM_TLS_VERSION",
        "UPSTREAM_TLS_SESSION_ID",
        "DOWNSTREAM_DETECTED_CLOSE_TYPE",
        "DOWNSTREAM_HANDSHAKE_DURATION",
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON",
        "DOWNSTREAM_TLS_CIPHER",
        "DOWNSTREAM_TLS_VERSION",
        "DOWNSTREAM_TLS_SESSION_ID",
        "PATH",
        "COALESCE",
    ]
)
"""Operators of Envoy's for which a waypoint has no value."""
_SILENT_WITH_ARGUMENT: Final = frozenset(
    ("FILTER_STATE", "UPSTREAM_FILTER_STATE", "DYNAMIC_METADATA", "CLUSTER_METADATA", "UPSTREAM_METADATA", "ENVIRONMENT")
)
_SILENT_PREFIXES: Final = (
    "DOWNSTREAM_PEER_",
    "DOWNSTREAM_LOCAL_DNS_SAN",
    "DOWNSTREAM_LOCAL_IP_SAN",
    "DOWNSTREAM_LOCAL_EMAIL_SAN",
    "DOWNSTREAM_LOCAL_OTHERNAME_SAN",
    "DOWNSTREAM_LOCAL_SUBJECT",
    "DOWNSTREAM_WIRE_",
    "DOWNSTREAM_HEADER_",
    "DOWNSTREAM_DECOMPRESSED_",
    "UPSTREAM_PEER_",
    "UPSTREAM_LOCAL_DNS_SAN",
    "UPSTREAM_LOCAL_URI_SAN",
    "UPSTREAM_LOCAL_IP_SAN",
    "UPSTREAM_LOCAL_SUBJECT",
    "UPSTREAM_WIRE_",
    "UPSTREAM_HEADER_",
    "UPSTREAM_DECOMPRESSED_",
)


def _is_harmless(text: str) -> bool:
    return text.isprintable() and '"' not in text and "\\" not in text


def _harmless(text: str | int) -> str | int:
    if isinstance(text, int) or _is_harmless(text):
        return text
    return "".join([char if char.isprintable() and char not in '"\\' else _escaped(char) for char in text])


def _escaped(char: str) -> str:
    return "".join([f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape")])
