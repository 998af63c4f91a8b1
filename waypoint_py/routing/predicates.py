"""Patterns of `mesh.model.l7.matching` as predicates on a request: compiled once, asked often.

Text is compared as bytes. A pattern that cannot be compiled (an expression that RE2 refuses) does not raise: it becomes one that hits
everything and says what is wrong, and whoever compiles it decides what closed means there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, TypeAlias

import re2

from mesh.http.message import Request
from mesh.model.l7.matching import (
    MAX_REGEX,
    Exact,
    HeaderMatch,
    PathKind,
    PathMatch,
    Prefix,
    Present,
    QueryMatch,
    Regex,
    RouteMatch,
    Suffix,
    TextMatch,
)

Test: TypeAlias = Callable[[bytes], bool]


class Seen:
    """A request as predicates look at it: what several of them ask for is worked out once."""

    __slots__ = ("_headers", "_query", "path", "port", "request")

    def __init__(self, request: Request, port: int = 0) -> None:
        """``port``: of the service, which the request came for."""
        self.request = request
        self.port = port
        self.path = request.path_only
        self._query: dict[bytes, bytes] | None = None
        self._headers: dict[bytes, tuple[bytes, ...]] = {}

    def headers(self, name: bytes) -> tuple[bytes, ...]:
        """A header's values, none if it is absent. Pseudo-headers count; ``host`` is ``:authority``."""
        values = self._headers.get(name)
        if values is None:
            values = self._headers[name] = header_values(self.request, name)
        return values

    def query(self, name: bytes) -> bytes | None:
        """The first value of a parameter, as it was written; empty for one without ``=``; None if it is absent."""
        if self._query is None:
            self._query = parse_query(self.request.query)
        return self._query.get(name)


def header_values(request: Request, name: bytes) -> tuple[bytes, ...]:
    """`Seen.headers` of a single question."""
    if name[:1] == b":" or name == b"host":
        if name == b":authority" or name == b"host":
            return (request.authority,)
        if name == b":method":
            return (request.method,)
        if name == b":path":
            return (request.path,)
        if name == b":scheme":
            return (request.scheme,)
    return tuple([value for key, value in request.headers if key == name])


def parse_query(query: bytes) -> dict[bytes, bytes]:
    """Parameters by name, the first value of each. Percent signs stay as they are: Envoy's route matching decodes neither names nor
    values."""
    found: dict[bytes, bytes] = {}
    for pair in query.split(b"&"):
        if pair:
            name, _, value = pair.partition(b"=")
            if name not in found:
                found[name] = value
    return found


class Compiled(NamedTuple):
    """A test, and why it could not be made as written (it is then true of everything); empty: it could."""

    test: Test
    broken: str = ""


def _always(text: bytes) -> bool:
    return True


def compile_text(match: TextMatch) -> Compiled:
    """The test of a text that is there."""
    if isinstance(match, Exact | Prefix | Suffix):
        return Compiled(_compare(match))
    if isinstance(match, Present):
        return Compiled(bool if match.non_empty else _always)
    return _whole(match.value)


def _compare(match: Exact | Prefix | Suffix) -> Test:
    value = match.value.encode()
    if match.ignore_case:
        folded = value.lower()
        if isinstance(match, Exact):
            return lambda text: text.lower() == folded
        if isinstance(match, Prefix):
            return lambda text: text.lower().startswith(folded)
        return lambda text: text.lower().endswith(folded)
    if isinstance(match, Exact):
        return value.__eq__
    if isinstance(match, Prefix):
        return lambda text: text.startswith(value)
    return lambda text: text.endswith(value)


@lru_cache(maxsize=1)
def _options() -> Any:
    options = re2.Options()
    options.log_errors = False
    return options


def compile_regex(expression: str) -> Any:
    """A RE2 expression over bytes. Raises ValueError with RE2's reason."""
    if len(expression) > MAX_REGEX:
        raise ValueError(f"an expression of {len(expression)} characters, more than {MAX_REGEX}")
    try:
        return re2.compile(expression.encode(), _options())
    except re2.error as exc:
        reason = exc.args[0] if exc.args else "no reason given"
        raise ValueError(f"RE2 refuses {expression!r}: {reason.decode() if isinstance(reason, bytes) else reason}") from exc


def _whole(expression: str) -> Compiled:
    try:
        full_match = compile_regex(expression).fullmatch
    except ValueError as exc:
        return Compiled(_always, str(exc))
    return Compiled(lambda text: full_match(text) is not None)


# Paths ---------------------------------------------------------------------------------------------------------------------------------


def segment_prefix(value: str) -> bytes:
    """What a path that `PathKind.SEGMENTS` matches begins with, without the trailing slash; empty for ``/``."""
    return value.removesuffix("/").encode()


def compile_path(match: PathMatch) -> Compiled:
    """The test of a path without its query."""
    kind = match.kind
    if kind is PathKind.EXACT:
        return Compiled(_compare(Exact(match.value, match.ignore_case)))
    if kind is PathKind.PREFIX:
        return Compiled(_compare(Prefix(match.value, match.ignore_case)))
    if kind is PathKind.REGEX:
        return _whole(match.value)
    if kind is PathKind.TEMPLATE:
        try:
            return _whole(template_regex(match.value))
        except ValueError as exc:
            return Compiled(_always, str(exc))
    return Compiled(_segments(segment_prefix(match.value), match.ignore_case))


def _segments(prefix: bytes, ignore_case: bool) -> Test:
    below = prefix + b"/"
    if not prefix:
        return lambda path: path.startswith(below)
    if ignore_case:
        folded, folded_below = prefix.lower(), below.lower()
        return lambda path: (lower := path.lower()) == folded or lower.startswith(folded_below)
    return lambda path: path == prefix or path.startswith(below)


_PCHAR: Final = r"[a-zA-Z0-9\-._~%!$&'()+,;:@=]"
_OPERATOR: Final = re.compile(r"\{[^}]*\}|\{|\}")


def template_regex(template: str) -> str:
    """The expression of an AuthorizationPolicy's path template: ``{*}`` is one segment, ``{**}`` anything. Raises ValueError."""
    if not template.startswith("/"):
        raise ValueError(f"a path template begins with a slash: {template!r}")
    pieces: list[str] = []
    seen_glob = False
    for segment in template[1:].split("/"):
        if segment in ("{*}", "{**}"):
            if seen_glob:
                raise ValueError(f"nothing but text may follow {{**}} in the path template {template!r}")
            seen_glob = segment == "{**}"
            pieces.append("/" + (f"(?:{_PCHAR}|/)*" if seen_glob else f"{_PCHAR}+"))
            continue
        if _OPERATOR.search(segment) or "*" in segment:
            raise ValueError(f"{{*}} and {{**}} fill a segment, and there is no other operator: {template!r}")
        pieces.append("/" + str(re2.escape(segment)))
    return "".join(pieces)


def required_prefix(match: PathMatch) -> bytes:
    """What every path begins with that a REGEX or TEMPLATE matches; empty if nothing is known of it."""
    try:
        expression = match.value if match.kind is PathKind.REGEX else template_regex(match.value)
        lowest, highest = compile_regex(expression).possiblematchrange(64)
    except (ValueError, re2.error):
        return b""
    return _common_prefix(lowest, highest)


def _common_prefix(one: bytes, other: bytes) -> bytes:
    size = 0
    for ours, theirs in zip(one, other, strict=False):
        if ours != theirs:
            break
        size += 1
    return one[:size]


# A whole match -------------------------------------------------------------------------------------------------------------------------

Predicate: TypeAlias = Callable[[Seen], bool]


class CompiledMatch(NamedTuple):
    """A `RouteMatch` as predicates that must all hold. ``broken``: why some of them could not be made; those hold for everything."""

    predicates: tuple[Predicate, ...]
    broken: str

    def holds(self, seen: Seen) -> bool:
        for predicate in self.predicates:  # noqa: SIM110 - a generator would cost more than most predicates
            if not predicate(seen):
                return False
        return True


def compile_match(match: RouteMatch) -> CompiledMatch:
    """Cheap predicates first; their order does not change what they say."""
    predicates: list[Predicate] = []
    broken: list[str] = []

    def take(compiled: Compiled, make: Callable[[Test], Predicate]) -> None:
        if compiled.broken:
            broken.append(compiled.broken)
        else:
            predicates.append(make(compiled.test))

    if port := match.port:
        predicates.append(lambda seen: seen.port == port)
    if match.method is not None:
        take(compile_text(match.method), lambda test: lambda seen: test(seen.request.method))
    if match.path is not None:
        take(compile_path(match.path), lambda test: lambda seen: test(seen.path))
    if match.scheme is not None:
        take(compile_text(match.scheme), lambda test: lambda seen: test(seen.request.scheme))
    if match.authority is not None:
        take(compile_text(match.authority), lambda test: lambda seen: test(seen.request.authority))
    for header in match.headers:
        take(compile_text(header.match), partial(_header, header))
    for parameter in match.query:
        take(compile_text(parameter.match), partial(_query, parameter))
    return CompiledMatch(tuple(predicates), "; ".join(broken))


def _header(header: HeaderMatch, test: Test) -> Predicate:
    """One value that hits is enough, as in Envoy since 1.39: joined, a second value would hide the first from an exact match
    (CVE-2026-26308)."""
    name = header.name.encode()

    def hits(seen: Seen) -> bool:
        for value in seen.headers(name):  # noqa: SIM110 - a generator would cost more than most tests
            if test(value):
                return True
        return False

    if not header.invert:
        return hits
    if not header.absent_fails:
        return lambda seen: not hits(seen)
    return lambda seen: bool(seen.headers(name)) and not hits(seen)


def _query(parameter: QueryMatch, test: Test) -> Predicate:
    name = parameter.name.encode()
    return lambda seen: (value := seen.query(name)) is not None and test(value)


def describe(match: RouteMatch) -> str:
    """A match in a few words, for reasons: ``path prefix /foo, header version exact two``."""
    parts = [f"match {match.name!r}"] if match.name else []
    if match.path is not None:
        parts.append(f"path {_PATH_WORDS[match.path.kind]} {match.path.value}")
    named: tuple[tuple[str, TextMatch | None], ...] = (("method", match.method), ("scheme", match.scheme), ("authority", match.authority))
    parts += [f"{name} {_describe_text(text)}" for name, text in named if text is not None]
    for header in match.headers:
        parts.append(f"{'not ' if header.invert else ''}header {header.name} {_describe_text(header.match)}")
    parts += [f"query {parameter.name} {_describe_text(parameter.match)}" for parameter in match.query]
    if match.port:
        parts.append(f"port {match.port}")
    return ", ".join(parts) or "every request"


_PATH_WORDS: Final = {
    PathKind.EXACT: "exactly",
    PathKind.PREFIX: "prefix",
    PathKind.SEGMENTS: "below",
    PathKind.REGEX: "regex",
    PathKind.TEMPLATE: "template",
}


def _describe_text(match: TextMatch) -> str:
    if isinstance(match, Present):
        return "not empty" if match.non_empty else "present"
    words = {Exact: "exactly", Prefix: "prefix", Suffix: "suffix", Regex: "regex"}
    return f"{words[type(match)]} {match.value}"
