"""How what runs was built: the data path as machine code (`setup.py`) or as Python, and the library under TLS."""

from __future__ import annotations

from typing import Final

from mesh.reactor import loop, tls

COMPILED: Final = not loop.__file__.endswith(".py")
"""The reactor stands for all: setup.py compiles all of its list or nothing."""

COMPILED_LIBRARY: Final = "ambient_mesh__mypyc"
"""How the file begins that all compiled modules share (setup.py)."""

BUILD_STATUS: Final = f"{'Python, compiled data path' if COMPILED else 'Python'}, {tls.LIBRARY}"
"""For people and configuration dumps."""
