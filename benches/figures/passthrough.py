"""The data path without a tunnel: a captured pod speaks to a server outside the mesh, so its own node's proxy alone passes plain TCP on."""

from __future__ import annotations

from typing import Final

from benches.figures import bulk, connections, round_trip
from benches.rows import Record, Row
from benches.stage import DATA_PATH, Say, subjects
from benches.turns import take_turns

FIGURE: Final = "passthrough"
ROUNDS: Final = 5


def measure(say: Say) -> list[Row]:
    """Raises Broken."""
    record = Record(FIGURE)
    tasks = [*bulk.tasks((1, 16), ("up", "down")), *connections.tasks(), *round_trip.tasks()]
    with subjects(say, DATA_PATH) as taking_part:
        take_turns(record, [subject.beyond() for subject in taking_part], tasks, ROUNDS, say)
    return record.rows()
