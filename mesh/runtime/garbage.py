"""How seldom a data plane process looks for garbage that lies in cycles."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """To be called once everything is imported and nothing is served yet.

    By default Python looks for cycles every 700 objects, about once a connection or a request, and code and modules are looked through each
    time. What a connection leaves in cycles is small and holds no descriptor: some hundred connections' worth may wait.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()
