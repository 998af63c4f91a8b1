"""KiB of an idle captured connection and proxy, up to 10 000 connections."""

from __future__ import annotations

import time
from typing import Final

from benches.cpu import proportional_kib
from benches.rows import Record, Row
from benches.stage import PROXIES, Say, subjects

FIGURE: Final = "idle"
STEPS: Final = 5
CONNECTIONS: Final = 10_000
_SETTLE: Final = 1.0
"""Seconds until nothing of the opening is under way."""


def measure(say: Say) -> list[Row]:
    """Fresh proxies hold more and more connections; every step adds a sample of what a connection costs, and a point of the curve.
    Raises Broken."""
    record = Record(FIGURE)
    step = CONNECTIONS // STEPS
    with subjects(say, PROXIES) as taking_part:
        for subject in taking_part:
            say(f"{CONNECTIONS} connections through {subject.name}")
            first = before = proportional_kib(subject.pids)
            record.add("no connection", "KiB/proxy", subject.name, first / 2)
            for number in range(1, STEPS + 1):
                subject.do("hold", count=step, parallel=64)
                time.sleep(_SETTLE)
                now = proportional_kib(subject.pids)
                record.add(f"of {CONNECTIONS} connections", "KiB/connection", subject.name, (now - before) / step / 2)
                record.add(f"{number * step} connections", "KiB/proxy", subject.name, now / 2)
                before = now
            record.add("on average", "KiB/connection", subject.name, (before - first) / CONNECTIONS / 2)
            subject.client.do("release")
    return record.rows()
