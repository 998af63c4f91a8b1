"""New tunnels: full mutual TLS handshakes a CPU second and a second, with a connection in each so that it carried something."""

from __future__ import annotations

import time
from typing import Final

from benches.rows import Record, Row
from benches.stage import PROXIES, Broken, Say, Subject, subjects
from benches.turns import Seen, Task, take_turns

FIGURE: Final = "handshakes"
ROUNDS: Final = 13
COUNT: Final = 150
UNUSED: Final = 0.5
"""Seconds after which a tunnel that carries nothing is gone: 100 ms is what proxies were told."""


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    with subjects(say, PROXIES, tunnel_each=True) as taking_part:
        take_turns(record, taking_part, [_task(parallel) for parallel in (1, 16)], ROUNDS, say)
    return record.rows()


def _task(parallel: int) -> Task:
    def work(subject: Subject) -> Seen:
        # Held, so that the next one finds no tunnel to share.
        return subject.do("hold", count=COUNT, parallel=parallel)

    quantities = {
        "handshakes/cpu s": lambda cpu, _: COUNT / cpu,
        "cpu us/handshake": lambda cpu, _: cpu / COUNT * 1e6,
        "handshakes/s": lambda _, seen: COUNT / seen["seconds"],
    }
    return Task(f"{parallel} at a time", work, quantities, after=_let_go)


def _let_go(subject: Subject) -> None:
    if (tunnels := subject.tunnels()) < COUNT:
        raise Broken(f"{COUNT} connections through {subject.name} are in {tunnels} tunnels: they share some")
    subject.client.do("release")
    time.sleep(UNUSED)
