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


@pytest.mark.parametrize("path", _listed())
def test_a_name_is_one_kind_of_exception_in_a_function_that_is_compiled(path: str) -> None:
    # Compiled, a name has the type of its first use: another exception under it is a TypeError.
    for function in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(function, ast.FunctionDef):
            kinds: dict[str, set[str]] = {}
            for handler in ast.walk(function):
                if isinstance(handler, ast.ExceptHandler) and handler.name is not None and handler.type is not None:
                    kinds.setdefault(handler.name, set()).add(ast.unparse(handler.type))
            assert [name for name, caught in kinds.items() if len(caught) > 1] == [], f"{path}: {function.name}"


@pytest.mark.parametrize("path", _listed())
def test_nothing_is_called_within_the_bounds_of_a_slice_that_is_compiled(path: str) -> None:
    # Compiled, of anything but a list, a tuple, a str or bytes, it is called twice.
    slices = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.Slice)]
    calls = [call for each in slices for call in ast.walk(each) if isinstance(call, ast.Call)]
    assert [ast.unparse(call) for call in calls if ast.unparse(call.func) not in ("len", "min", "max")] == []


def test_no_class_that_is_not_compiled_inherits_from_one_that_is() -> None:
    # Compiled, its first instance is a TypeError.
    compiled = {path.removesuffix(".py").replace("/", ".") for path in _listed()}
    for package in ("mesh", "ztunnel_py", "waypoint_py", "istiod_py", "meshctl_py"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            if "__main__" not in name and not name.startswith(("mesh.xds.proto", "mesh.testing")):
                importlib.import_module(name.removesuffix(".__init__"))
    heirs = [
        f"{heir.__module__}.{heir.__name__} of {base.__name__}"
        for base in _all_heirs(object)
        if base.__module__ in compiled and not getattr(base, "_is_protocol", False)
        for heir in base.__subclasses__()
        if heir.__module__ not in compiled and not heir.__module__.startswith("tests.")
    ]
    assert heirs == []


def _all_heirs(base: type) -> set[type]:
    found: set[type] = set()
    waiting = [base]
    while waiting:
        for heir in type.__subclasses__(waiting.pop()):
            if heir not in found:
                found.add(heir)
                waiting.append(heir)
    return found


def test_no_module_is_listed_twice() -> None:
    assert len(_listed()) == len(set(_listed()))
