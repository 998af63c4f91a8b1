"""Which trace a request belongs to: reads W3C Trace Context and B3 (several headers, or one), decides about sampling, writes what goes on.

A trace that comes goes on in the forms it came in; one that begins here is written as ``traceparent``. What is malformed counts as absent
and is not passed on beside a new context: whoever read it then would report to another trace than we. Pure; randomness is an argument.
Sources: W3C Trace Context level 2; openzipkin's b3-propagation.
"""

from __future__ import annotations

import random
import re
from typing import Final, NamedTuple

from mesh.http.message import Headers

TRACEPARENT: Final = b"traceparent"
TRACESTATE: Final = b"tracestate"
B3: Final = b"b3"
_TRACE_ID: Final = b"x-b3-traceid"
_SPAN_ID: Final = b"x-b3-spanid"
_PARENT_ID: Final = b"x-b3-parentspanid"
_SAMPLED: Final = b"x-b3-sampled"
_FLAGS: Final = b"x-b3-flags"
_MULTI: Final = frozenset((_TRACE_ID, _SPAN_ID, _PARENT_ID, _SAMPLED, _FLAGS))
TRACE_HEADERS: Final = _MULTI | {TRACEPARENT, TRACESTATE, B3}

_TRACEPARENT_FORM: Final = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_WIDE_ID: Final = re.compile(rb"[0-9A-Fa-f]{16}(?:[0-9A-Fa-f]{16})?")
_ID: Final = re.compile(rb"[0-9A-Fa-f]{16}")
_DECISIONS: Final = {b"1": True, b"true": True, b"d": True, b"0": False, b"false": False}
_SAMPLED_FLAG: Final = 1
_RANDOM_FLAG: Final = 2


class Incoming(NamedTuple):
    """What a request said. ``trace_id`` 0: there is no trace (but maybe a decision). ``sampled`` None: nobody has decided.
    ``parent_id``: of the span that called. ``w3c``, ``b3`` and ``multi``: the forms that it came in."""

    trace_id: int = 0
    parent_id: int = 0
    sampled: bool | None = None
    debug: bool = False
    """B3's flag that says: sample, whatever else says no."""
    random: bool = False
    """W3C's flag that says: the lower half of the id was drawn by chance."""
    narrow: bool = False
    """The id came with 64 bits, and goes on so."""
    w3c: bool = False
    b3: bool = False
    multi: bool = False
    tracestate: bytes = b""
    present: bool = False
    """There is a header of these, good or bad."""


NOTHING: Final = Incoming()


class SpanContext(NamedTuple):
    """The span that is recorded here. ``parent_id`` 0: the trace begins with it."""

    trace_id: int
    span_id: int
    parent_id: int
    tracestate: bytes = b""


class Decision(NamedTuple):
    """``span`` None: nothing is recorded. ``trace_id`` 0: no trace. ``headers`` None: what came goes on as it is."""

    trace_id: int
    span: SpanContext | None
    headers: Headers | None


def decide(headers: Headers, percent: float, rng: random.Random) -> Decision:
    """Read what came, respect its decision or draw one (``percent`` of requests), and say what goes on."""
    incoming = read_context(headers)
    sampled = incoming.sampled
    if sampled is False:
        return Decision(incoming.trace_id, None, None)
    if sampled is None:
        sampled = rng.random() * 100 < percent
    trace_id = incoming.trace_id or rng.getrandbits(128) or 1
    if sampled:
        span = SpanContext(trace_id, rng.getrandbits(64) or 1, incoming.parent_id, incoming.tracestate)
        return Decision(trace_id, span, write_context(headers, incoming, trace_id, span.span_id, incoming.parent_id, sampled=True))
    if incoming.trace_id:  # B3 left the decision to us, and it is no
        return Decision(trace_id, None, write_context(headers, incoming, trace_id, incoming.parent_id, 0, sampled=False))
    # As Envoy does: whoever comes next learns that this trace is not sampled, so that nobody begins another half-way.
    return Decision(trace_id, None, write_context(headers, incoming, trace_id, rng.getrandbits(64) or 1, 0, sampled=False))


def read_context(headers: Headers) -> Incoming:
    """W3C's context goes before B3's, B3's one header before its several. Never raises."""
    found: dict[bytes, bytes] = {}
    several = False
    for name, value in headers:
        if name in TRACE_HEADERS:
            if name == TRACESTATE:
                found[name] = found[name] + b"," + value if name in found else value
            elif name in found:
                several = several or name == TRACEPARENT  # W3C: two of them are none
            else:
                found[name] = value
    if not found:
        return NOTHING
    single, multi = _read_single(found.get(B3)), _read_multi(found)
    best = single or multi or NOTHING
    w3c = None if several else _read_traceparent(found.get(TRACEPARENT))
    if w3c is not None:
        best = w3c._replace(tracestate=found.get(TRACESTATE, b""), debug=best.debug and best.trace_id == w3c.trace_id)
    return best._replace(w3c=w3c is not None, b3=single is not None, multi=multi is not None, present=True)


def _read_traceparent(value: bytes | None) -> Incoming | None:
    found = _TRACEPARENT_FORM.fullmatch(value.strip(b" \t")) if value is not None else None
    if found is None or found[1] == b"ff" or (found[1] == b"00" and found[5] is not None):
        return None
    trace_id, parent_id, flags = int(found[2], 16), int(found[3], 16), int(found[4], 16)
    if not trace_id or not parent_id:
        return None
    return Incoming(trace_id, parent_id, bool(flags & _SAMPLED_FLAG), random=bool(flags & _RANDOM_FLAG))


def _read_single(value: bytes | None) -> Incoming | None:
    """``0``, ``1``, ``d``, or trace, span, and maybe the decision and the span's own parent, with ``-`` between."""
    if value is None:
        return None
    parts = value.split(b"-")
    if len(parts) == 1:
        decision = _DECISIONS.get(value)
        return None if decision is None else Incoming(sampled=decision, debug=value == b"d")
    if len(parts) > 4 or (len(parts) == 4 and not _ID.fullmatch(parts[3])):
        return None
    said = parts[2] if len(parts) > 2 else None
    if said is not None and said not in _DECISIONS:
        return None
    return _ids(parts[0], parts[1], None if said is None else _DECISIONS[said], debug=said == b"d")


def _read_multi(found: dict[bytes, bytes]) -> Incoming | None:
    debug = found.get(_FLAGS) == b"1"
    sampled = True if debug else _DECISIONS.get(found.get(_SAMPLED, b"").lower())
    trace_id, span_id = found.get(_TRACE_ID), found.get(_SPAN_ID)
    if trace_id is not None and span_id is not None:
        ids = _ids(trace_id, span_id, sampled, debug=debug)
        if ids is not None:
            return ids
    return None if sampled is None else Incoming(sampled=sampled, debug=debug)


def _ids(trace: bytes, span: bytes, sampled: bool | None, *, debug: bool) -> Incoming | None:
    if not _WIDE_ID.fullmatch(trace) or not _ID.fullmatch(span):
        return None
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id:
        return None
    return Incoming(trace_id, span_id, sampled, debug, narrow=len(trace) == 16)


def write_context(headers: Headers, incoming: Incoming, trace_id: int, span_id: int, parent_id: int, *, sampled: bool) -> Headers:
    """The headers with this context in the forms that ``incoming`` had, by default W3C's. ``parent_id`` 0: B3 need not name one."""
    kept = [pair for pair in headers if pair[0] not in TRACE_HEADERS] if incoming.present else headers.copy()
    trace = b"%016x" % trace_id if incoming.narrow else b"%032x" % trace_id
    debug = incoming.debug and sampled
    if incoming.w3c or not (incoming.b3 or incoming.multi):
        flags = (_SAMPLED_FLAG if sampled else 0) | (_RANDOM_FLAG if incoming.random else 0)
        kept.append((TRACEPARENT, b"00-%032x-%016x-%02x" % (trace_id, span_id, flags)))
        if incoming.tracestate:
            kept.append((TRACESTATE, incoming.tracestate))
    if incoming.b3:
        said = b"d" if debug else b"1" if sampled else b"0"
        parent = b"-%016x" % parent_id if parent_id else b""
        kept.append((B3, b"%b-%016x-%b%b" % (trace, span_id, said, parent)))
    if incoming.multi:
        kept += ((_TRACE_ID, trace), (_SPAN_ID, b"%016x" % span_id))
        if parent_id:
            kept.append((_PARENT_ID, b"%016x" % parent_id))
        kept.append((_FLAGS, b"1") if debug else (_SAMPLED, b"1" if sampled else b"0"))
    return kept
