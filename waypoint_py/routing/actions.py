"""What a route does to a request, as values: answer it, or choose a destination, and how request and response change on the way.

`compile_route` prepares a route; it never raises. What of it cannot be carried out as written (an expression that RE2 refuses) is
answered 500 and says why, for every request that may have been meant: a broken route never lets another have them.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final, NamedTuple, TypeAlias, assert_never

from mesh.http.message import Headers, Message, Request
from mesh.model.l7.matching import PathKind, PathMatch
from mesh.model.l7.routing import DirectResponse, Forward, Redirect, Rewrite, Route, WeightedDestination
from mesh.telemetry.operators import Facts
from waypoint_py.routing.cors import CompiledCors, compile_cors
from waypoint_py.routing.headers import NO_CHANGES, CompiledChanges, compile_changes
from waypoint_py.routing.predicates import compile_regex, segment_prefix
from waypoint_py.verdict import Flag, LocalReply

ORIGINAL_PATH: Final = b"x-envoy-original-path"
ORIGINAL_HOST: Final = b"x-envoy-original-host"
REDIRECTS: Final = frozenset((301, 302, 303, 307, 308))
DIRECT_RESPONSE: Final = "direct_response"
_DEFAULT_PORTS: Final = {b"http": b"80", b"https": b"443"}

PathRewrite: TypeAlias = Callable[[bytes, PathMatch | None], bytes]
"""A path without query, and what matched it, to another."""


@dataclass(frozen=True, slots=True)
class CompiledDestination:
    """One destination of a route. ``authority``: what the request's becomes towards it; empty: it stays."""

    to: WeightedDestination
    request: CompiledChanges
    response: CompiledChanges
    authority: bytes


@dataclass(frozen=True, slots=True)
class Weights:
    """Destinations with a share, and where each share ends."""

    destinations: tuple[CompiledDestination, ...]
    ends: tuple[int, ...]

    def pick(self, rng: random.Random) -> CompiledDestination:
        """One of them, by weight. There must be one."""
        if len(self.ends) == 1:
            return self.destinations[0]
        # Of whole numbers, since a float below 1 times a large total may round up to it.
        return self.destinations[bisect_right(self.ends, rng.randrange(self.ends[-1]))]


@dataclass(frozen=True, slots=True)
class CompiledRoute:
    """A route, ready. ``broken``: why nothing can be done with its requests; empty: it can."""

    route: Route
    request: CompiledChanges = NO_CHANGES
    response: CompiledChanges = NO_CHANGES
    weights: Weights | None = None
    """None: it does not forward, or nowhere."""
    rewrite_path: PathRewrite | None = None
    authority: bytes = b""
    cors: CompiledCors | None = None
    broken: str = ""


class Chosen(NamedTuple):
    """Where a request goes, of what was offered it."""

    destination: CompiledDestination
    route: CompiledRoute

    @property
    def because(self) -> str:
        """How it was chosen."""
        origin, weights = self.route.route.origin, self.route.weights
        if weights is None or len(weights.ends) == 1:
            return str(origin)
        return f"{origin}: a share of {self.to.weight} in {weights.ends[-1]}"

    @property
    def to(self) -> WeightedDestination:
        return self.destination.to


def compile_route(route: Route) -> CompiledRoute:
    """Ready for requests; never raises."""
    request, response = compile_changes(route.request), compile_changes(route.response)
    cors = None if route.cors is None else compile_cors(route.cors)
    broken = [text for text in (request.broken, response.broken) if text]
    if not isinstance(route.action, Forward):
        return CompiledRoute(route, request, response, cors=cors, broken="; ".join(broken))
    rewrite_path: PathRewrite | None = None
    authority = request.authority
    if (rewrite := route.action.rewrite) is not None:
        authority = (rewrite.authority or "").encode() or authority
        try:
            rewrite_path = compile_rewrite(rewrite)
        except ValueError as exc:
            broken.append(str(exc))
    weights = _compile_weights(route.action)
    for destination in () if weights is None else weights.destinations:
        broken += [text for text in (destination.request.broken, destination.response.broken) if text]
    return CompiledRoute(route, request, response, weights, rewrite_path, authority, cors, "; ".join(broken))


def _compile_weights(action: Forward) -> Weights | None:
    with_share = [destination for destination in action.destinations if destination.weight > 0]
    if not with_share:
        return None
    compiled = []
    for destination in with_share:
        request = compile_changes(destination.request)
        authority = destination.authority.encode() or request.authority
        compiled.append(CompiledDestination(destination, request, compile_changes(destination.response), authority))
    return Weights(tuple(compiled), tuple(accumulate(destination.weight for destination in with_share)))


# Answers -------------------------------------------------------------------------------------------------------------------------------


def answer(route: CompiledRoute, request: Request, path: PathMatch | None, port: int) -> LocalReply | None:
    """What the route answers by itself: a redirect, a direct response, or 500 because it is broken; None: it forwards.

    ``path``: what matched; ``port``: the service's. The response's changes are still to be made (`change_reply`).
    """
    origin = route.route.origin
    if route.broken:
        return LocalReply(500, details=DIRECT_RESPONSE, because=f"{origin} cannot be carried out: {route.broken}")
    action = route.route.action
    match action:
        case Forward():
            return None
        case Redirect():
            status = action.status if action.status in REDIRECTS else 301
            headers: Headers = [(b"location", location(action, request, path, port))]
            return LocalReply(status, headers=headers, details=DIRECT_RESPONSE, because=f"{origin} redirects")
        case DirectResponse():
            return LocalReply(action.status, action.body, details=DIRECT_RESPONSE, because=f"{origin} answers itself")
        case _:
            assert_never(action)


def location(redirect: Redirect, request: Request, path: PathMatch | None, port: int) -> bytes:
    """Where a redirect sends a request.

    The port, when the redirect names one: that. With ``request_port``: the service's, and where that is the scheme's own, none, except one
    that the client wrote. Otherwise the scheme's own where the redirect names a scheme (the Gateway API demands it, though Envoy keeps a
    port that the client wrote), else what the client wrote.
    """
    scheme = request.scheme if redirect.scheme is None else redirect.scheme.encode()
    host, written = split_port(request.authority if redirect.authority is None else redirect.authority.encode())
    target = _redirected_path(redirect, request, path)
    if not host:
        return target
    port_text = _redirected_port(redirect, request.scheme, scheme, written, port)
    return b"%b://%b%b%b" % (scheme, host, b":" + port_text if port_text else b"", target)


def _redirected_port(redirect: Redirect, before: bytes, scheme: bytes, written: bytes, port: int) -> bytes:
    """Empty for none. ``written``: with the authority, by the client or the redirect."""
    own = _DEFAULT_PORTS.get(scheme, b"")
    if redirect.port is not None:
        wanted = str(redirect.port).encode()
    elif redirect.authority is not None and written:
        return written
    elif redirect.request_port:
        wanted = str(port).encode()
    elif redirect.scheme is not None:
        wanted = own
    else:
        return written
    if wanted != own:
        return wanted
    if redirect.request_port and redirect.port is None:
        # The client may have come through a forwarded port: what it wrote leads back to us, unless it was a scheme's that is no more.
        return b"" if before != scheme and written == _DEFAULT_PORTS.get(before) else written
    return written if written == own and before == scheme else b""


def _redirected_path(redirect: Redirect, request: Request, path: PathMatch | None) -> bytes:
    only, mark, query = request.path.partition(b"?")
    if redirect.path is not None:
        replaced = redirect.path.encode()
        if b"?" in replaced:  # it brings a query of its own
            return replaced
    elif redirect.prefix is not None:
        replaced = replace_prefix(only, path, redirect.prefix.encode())
    else:
        replaced = only
    return replaced + mark + query


def split_port(authority: bytes) -> tuple[bytes, bytes]:
    """Host (in brackets, if it is in them) and port, empty if there is none."""
    host, colon, port = authority.rpartition(b":")
    if colon and port.isdigit() and (b":" not in host or host.endswith(b"]")):
        return host, port
    return authority, b""


# Choosing ------------------------------------------------------------------------------------------------------------------------------


def choose(route: CompiledRoute, rng: random.Random) -> Chosen | LocalReply:
    """One of a forwarding route's destinations, or the answer where there is none or the share drawn is that of one that cannot be used."""
    weights = route.weights
    if weights is None:
        action = route.route.action
        status = action.empty_status if isinstance(action, Forward) else 500
        return LocalReply(status, details=DIRECT_RESPONSE, because=f"{route.route.origin} has no destination with a share")
    chosen = weights.pick(rng)
    to = chosen.to
    if to.fails_with is not None:
        why = to.because or "its destination cannot be used"
        because = f"{route.route.origin}: {why}"
        return LocalReply(to.fails_with, flags=(Flag.NO_CLUSTER_FOUND,), details="cluster_not_found", because=because)
    return Chosen(chosen, route)


# Changes -------------------------------------------------------------------------------------------------------------------------------


def change_request(request: Request, route: CompiledRoute, chosen: CompiledDestination, path: PathMatch | None, facts: Facts) -> None:
    """Make a request what its destination shall see. Once per request, before its first try; operators see it as it was.

    Order: the route's headers, the destination's, the authority (the route's word before the destination's), the path.
    """
    if route.request is not NO_CHANGES:
        route.request.apply(request, facts)
    if chosen.request is not NO_CHANGES:
        chosen.request.apply(request, facts)
    if authority := route.authority or chosen.authority:
        request.replace(ORIGINAL_HOST, request.authority)
        request.authority = authority
    if route.rewrite_path is not None:
        original = request.path
        only, mark, query = original.partition(b"?")
        request.path = route.rewrite_path(only, path) + mark + query
        request.replace(ORIGINAL_PATH, original)


def changed_request(request: Request, route: CompiledRoute, chosen: CompiledDestination, path: PathMatch | None, facts: Facts) -> Request:
    """A copy with `change_request`'s changes; the very one that was given if there are none."""
    if (
        route.request is NO_CHANGES
        and chosen.request is NO_CHANGES
        and route.rewrite_path is None
        and not (route.authority or chosen.authority)
    ):
        return request
    outgoing = request.copy()
    change_request(outgoing, route, chosen, path, facts)
    return outgoing


def change_response(response: Message, route: CompiledRoute, chosen: CompiledDestination | None, facts: Facts) -> None:
    """Make an upstream's response what the client shall see: the route's changes, then the destination's."""
    if route.response is not NO_CHANGES:
        route.response.apply(response, facts)
    if chosen is not None and chosen.response is not NO_CHANGES:
        chosen.response.apply(response, facts)


def change_reply(reply: LocalReply, route: CompiledRoute, chosen: CompiledDestination | None, facts: Facts) -> LocalReply:
    """An answer of ours with the changes that a response gets: any answer but a preflight's, from the time the route is known; that of a
    destination too, once it is chosen (no endpoint, timeout). So does Envoy."""
    if not route.response and (chosen is None or not chosen.response):
        return reply
    message = Message(list(reply.headers))
    change_response(message, route, chosen, facts)
    return replace(reply, headers=message.headers)


# Paths ---------------------------------------------------------------------------------------------------------------------------------


def replace_prefix(path: bytes, match: PathMatch | None, replacement: bytes) -> bytes:
    """A path whose matched part is replaced.

    After a segment prefix the rest begins with a slash or is empty, and the two meet with exactly one slash (Gateway API's table for
    ReplacePrefixMatch). A plain prefix is replaced as text; of any other match the matched part is the whole path. No match at all is
    that of the plain prefix ``/``, as Istio writes it.
    """
    if match is None:
        return replacement + path.removeprefix(b"/")
    if match.kind is PathKind.PREFIX:
        prefix = match.value.encode()
        return replacement + path[len(prefix) :]
    if match.kind is not PathKind.SEGMENTS:
        return replacement
    segments = segment_prefix(match.value)
    rest = path[len(segments) :]
    start = replacement.removesuffix(b"/")
    if rest:
        return start + rest
    return replacement if start else b"/"


def compile_rewrite(rewrite: Rewrite) -> PathRewrite | None:
    """None: the path stays. Raises ValueError."""
    if rewrite.prefix is not None:
        prefix = rewrite.prefix.encode()
        return lambda path, match: replace_prefix(path, match, prefix)
    if rewrite.full is not None:
        full = rewrite.full.encode()
        return lambda path, match: full
    if rewrite.regex is not None:
        expression = compile_regex(rewrite.regex)
        template = compile_substitution(rewrite.substitution, expression.groups)
        return lambda path, match: substitute(expression, template, path)
    return None


_ESCAPE: Final = re.compile(rb"\\(.?)", re.DOTALL)

Substitution: TypeAlias = tuple[bytes | int, ...]
"""Texts, and numbers of groups."""


def compile_substitution(text: str, groups: int) -> Substitution:
    """RE2's rewrite string: ``\\0`` to ``\\9`` and ``\\\\``. Raises ValueError for any other escape, and a group that there is not."""
    parts: list[bytes | int] = []
    raw = text.encode()
    at = 0
    for found in _ESCAPE.finditer(raw):
        start, end = found.span()
        parts.append(raw[at:start])
        at = end
        if found[1] == b"\\":
            parts.append(b"\\")
        elif not found[1].isdigit():
            raise ValueError(f"in the substitution {text!r} a backslash stands before neither digit nor backslash")
        elif int(found[1]) > groups:
            raise ValueError(f"the substitution {text!r} names group {int(found[1])}, of which there are {groups}")
        else:
            parts.append(int(found[1]))
    parts.append(raw[at:])
    return tuple(part for part in parts if part != b"")


def substitute(expression: Any, template: Substitution, text: bytes) -> bytes:
    """Every match replaced, as RE2's GlobalReplace does: no empty match right behind another match."""
    pieces: list[bytes] = []
    copied = position = 0
    last_end = -1
    while position <= len(text) and (found := expression.search(text, position)) is not None:
        start, end = found.span()
        if start == end == last_end:
            position = _next_character(text, position)
            continue
        pieces.append(text[copied:start])
        pieces += [part if isinstance(part, bytes) else found.group(part) or b"" for part in template]
        copied = last_end = end
        position = end if end > start else _next_character(text, end)
    pieces.append(text[copied:])
    return b"".join(pieces)


def _next_character(text: bytes, position: int) -> int:
    """Past one UTF-8 character, or one byte of what is none."""
    position += 1
    while position < len(text) and text[position] & 0xC0 == 0x80:
        position += 1
    return position
