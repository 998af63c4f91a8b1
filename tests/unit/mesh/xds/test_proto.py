"""The generated message classes are what the sources say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mesh.xds.proto

DIRECTORY = Path(mesh.xds.proto.__file__).parent


def test_generated_messages_are_those_of_their_sources(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "mesh.xds.proto.generate", str(tmp_path)], check=True, timeout=60)
    fresh = {path.name: path.read_text() for path in (tmp_path / "mesh/xds/proto").iterdir()}
    committed = {path.name: path.read_text() for path in DIRECTORY.glob("*_pb2.py*")}
    assert fresh == committed, "run `make proto`"
    assert len(committed) == 2 * len(list(DIRECTORY.glob("*.proto")))
