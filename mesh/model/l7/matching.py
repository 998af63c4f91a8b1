"""What a request must look like: patterns for texts, paths, headers and query parameters, and their conjunction.

Comparison is of raw bytes, case-sensitive unless said otherwise. Regular expressions are RE2's, matched against the whole text; the
control plane has refused what RE2 refuses, so compiling one cannot fail in a waypoint that was configured by us.
"""

from __future__ import annotations

from enum import Enum
from typing import TypeAlias

import msgspec

MAX_REGEX: int = 1024
"""Characters of a regular expression (Istio's bound)."""


class Exact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="exact", omit_defaults=True):
    value: str
    ignore_case: bool = False


class Prefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="prefix", omit_defaults=True):
    """A prefix of the text, wherever it ends (VirtualService, AuthorizationPolicy)."""

    value: str
    ignore_case: bool = False


class Suffix(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="suffix", omit_defaults=True):
    value: str
    ignore_case: bool = False


class Regex(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="regex"):
    """RE2, the whole text."""

    value: str


class Present(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="present", omit_defaults=True):
    """The attribute is there. ``non_empty``: and has at least one character (an AuthorizationPolicy's ``*``)."""

    non_empty: bool = False


TextMatch: TypeAlias = Exact | Prefix | Suffix | Regex | Present


class PathKind(Enum):
    EXACT = "exact"
    PREFIX = "prefix"
    """Plain text: ``/foo`` matches ``/foobar`` (VirtualService)."""
    SEGMENTS = "segments"
    """Whole segments, a trailing slash ignored: ``/foo`` matches ``/foo``, ``/foo/`` and ``/foo/bar`` (Gateway API's PathPrefix)."""
    REGEX = "regex"
    TEMPLATE = "template"
    """AuthorizationPolicy's ``{*}`` and ``{**}``."""


class PathMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Against the normalised path, without query and fragment."""

    kind: PathKind
    value: str
    ignore_case: bool = False
    """EXACT, PREFIX: ASCII letters in either case."""


class HeaderMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``name`` in lower case; ``:method``, ``:authority``, ``:scheme`` and ``:path`` stand for what they say. Of several values of one
    header each is compared by itself: one that hits is enough, and an inverted match fails then. A header that is absent matches nothing,
    and so makes an inverted match true, except with ``absent_fails``: then it makes the inverted match false as well (VirtualService's
    ``withoutHeaders``, which takes an absent header for an empty one, with a text that an empty value matches)."""

    name: str
    match: TextMatch
    invert: bool = False
    absent_fails: bool = False


class QueryMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Against the first value of the parameter; names are case-sensitive."""

    name: str
    match: TextMatch


class RouteMatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All of it must hold; what is None or empty does not restrict. ``authority`` is as the client wrote it, with its port; ``port``: that
    of the service which the request came for, 0: any."""

    name: str = ""
    path: PathMatch | None = None
    method: TextMatch | None = None
    scheme: TextMatch | None = None
    authority: TextMatch | None = None
    headers: tuple[HeaderMatch, ...] = ()
    query: tuple[QueryMatch, ...] = ()
    port: int = 0
