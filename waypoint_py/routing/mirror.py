"""Mirrored requests: which destinations get a copy, and how the copy looks."""

from __future__ import annotations

import random

from mesh.http.message import Request
from mesh.model.l7.routing import Mirror

SUFFIX = b"-shadow"


def draw_mirrors(mirrors: tuple[Mirror, ...], rng: random.Random) -> tuple[Mirror, ...]:
    """Those that get a copy of this request; each is drawn by itself."""
    return tuple([mirror for mirror in mirrors if mirror.percent > 0 and rng.random() * 100 < mirror.percent])


def shadow_authority(authority: bytes) -> bytes:
    """The authority of a copy: ``reviews:80`` becomes ``reviews-shadow:80``, so that logs tell copies apart. An IPv6 address stays: with
    a suffix it would be none."""
    if not authority or authority.startswith(b"["):
        return authority
    host, colon, port = authority.partition(b":")
    return host + SUFFIX + colon + port


def mirrored(request: Request) -> Request:
    """A copy of a request that was changed for its destination already. Nobody waits for its answer."""
    copy = request.copy()
    copy.authority = shadow_authority(request.authority)
    copy.expect_continue = False
    return copy
