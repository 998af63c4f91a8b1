"""What setup.py compiles: that mypyc can, and that whoever runs compiled code runs all of it so."""

from __future__ import annotations

import ast
import importlib
import runpy
from pathlib import Path

import pytest
import setuptools

from mesh.runtime.build import COMPILED

ROOT = Path(__file__).resolve().parents[3]


def _listed() -> list[str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setuptools, "setup", lambda **_: None)
        patched.delenv("AMBIENT_MESH_COMPILED", raising=False)
        listed: list[str] = runpy.run_path(str(ROOT / "setup.py"))["COMPILED"]
    return listed


@pytest.mark.parametrize("path", _listed())
def test_a_module_that_is_compiled_waits_for_nothing(path: str) -> None:
    # trio looks into the frames of coroutines, and those of compiled ones are not there; and what waits is not what compiling is for.
    tree = ast.parse((ROOT / path).read_text())
    waits = [node.name for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)]
    assert waits == []


@pytest.mark.parametrize("path", _listed())
def test_compiled_code_is_compiled_whole_and_python_is_python(path: str) -> None:
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert module.__file__ is not None
    assert module.__file__.endswith(".so") == COMPILED


def test_no_module_is_listed_twice() -> None:
    assert len(_listed()) == len(set(_listed()))
