"""What tests on a cluster measure comes through to who prints it."""

from __future__ import annotations

import execnet

from tests.cluster.figures import Figures


def test_figures_of_two_workers_are_printed_as_those_of_one() -> None:
    workers = (Figures(), Figures())
    for number, worker in enumerate(workers):
        worker.note(f"time {number}", "1.0 s")
        worker.events.append((f"event {number}", "0 of 50", "0 of 80", "50 of 50", "0"))
    found, wanted = Figures(), Figures()
    for worker in workers:
        found.add(*execnet.loads(execnet.dumps(worker.parts())))  # as pytest-xdist sends them
        wanted.others += worker.others
        wanted.events += worker.events
    assert len(found.lines()) == 2 + 1 + 2
    assert found.lines() == wanted.lines()
