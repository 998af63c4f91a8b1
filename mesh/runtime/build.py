"""Whether this process runs the data path as machine code (`setup.py`) or as Python."""

from __future__ import annotations

from typing import Final

from mesh.reactor import loop

COMPILED: Final = not loop.__file__.endswith(".py")
"""The reactor stands for all: setup.py compiles all of its list or nothing."""

COMPILED_LIBRARY: Final = "ambient_mesh__mypyc"
"""How the file begins that all compiled modules share (setup.py)."""

BUILD_STATUS: Final = "Python, compiled data path" if COMPILED else "Python"
"""For people and configuration dumps."""
