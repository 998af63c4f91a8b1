"""Makes ``*_pb2.py`` and ``*_pb2.pyi`` beside this file from the ``.proto`` sources: ``python -m mesh.xds.proto.generate [DIRECTORY]``.

grpcio-tools (a development dependency) carries the compiler. The output is committed, so that installing needs no compiler; a test
compares it with the sources.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def generate(directory: Path) -> None:
    """Writes below ``directory`` as ``mesh/xds/proto/NAME_pb2.py``. Exits with the compiler's message when a source is wrong."""
    from grpc_tools import protoc

    sources = sorted(str(source.relative_to(ROOT)) for source in HERE.glob("*.proto"))
    includes = [f"-I{ROOT}", f"-I{Path(protoc.__file__).parent / '_proto'}"]
    status = protoc.main(["protoc", *includes, f"--python_out={directory}", f"--pyi_out={directory}", *sources])
    if status:
        sys.exit(status)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
