"""A data plane process keeps what it works on in huge pages."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain, repeat
from typing import Final

import trio

from mesh.linux.memory import gather_in_huge_pages

_WHEN: Final = (2.0, 60.0)
"""Seconds from the start to the first time, when a small mesh is known, and from then to the next, when a large one is."""
_AGAIN: Final = 600.0


async def keep_in_huge_pages() -> None:
    """Gather the process's memory now and then, for as long as it runs.

    Who waits for the network finds the processor's address translations replaced by those of others each time it wakes. The heap of Python
    lies scattered over a thousand pages of 4 KiB; what that costs and what this gives: docs/design/data-path.md, "For every wake-up".
    """
    for pause in chain(_WHEN, repeat(_AGAIN)):
        await trio.sleep(pause)
        with suppress(OSError):  # costs the gain, never the process
            await trio.to_thread.run_sync(gather_in_huge_pages, abandon_on_cancel=True)  # whoever ends need not wait for it
