"""When memory is gathered, and that nothing depends on it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from mesh.runtime import hugepages


def test_memory_is_gathered_when_a_mesh_is_known_and_now_and_then_and_a_failure_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[float] = []

    def gather() -> int:
        gathered.append(clock.current_time())
        raise PermissionError("not this time")

    clock = trio.testing.MockClock(autojump_threshold=0.01)
    monkeypatch.setattr(hugepages, "gather_in_huge_pages", gather)

    async def main() -> None:
        with trio.move_on_after(1300):
            await hugepages.keep_in_huge_pages()

    trio.run(main, clock=clock)
    assert gathered == [2, 62, 662, 1262]
