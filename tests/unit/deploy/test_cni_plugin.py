"""The CNI plugin is written in Go: its own tests run from here where Go is there, and what it shares with the agent is compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mesh.model.enrolment import decide_enrolment

SOURCE = Path(__file__).parents[3] / "deploy" / "cni"
needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="there is no Go to build the CNI plugin with")


def go(*arguments: str) -> str:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    done = subprocess.run(["go", *arguments], cwd=SOURCE, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_go
def test_the_plugins_own_tests_pass() -> None:
    go("vet", "./...")
    go("test", "-count=1", "./...")


@needs_go
def test_the_plugin_needs_no_library_but_gos_own() -> None:
    assert go("list", "-m", "all").split() == ["ambient-mesh-cni"]


def test_agent_and_plugin_decide_alike_who_belongs_to_the_mesh() -> None:
    rows = json.loads((SOURCE / "testdata" / "enrolment.json").read_text())
    assert len(rows) > 10
    for row in rows:
        excluded = frozenset(row.pop("excluded_namespaces"))
        expected = row.pop("enrolled")
        assert decide_enrolment(**row, excluded_namespaces=excluded).enrolled == expected, row
