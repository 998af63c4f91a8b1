"""The script that builds the package cryptography with AWS-LC, without what takes three minutes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "deploy/images/aws-lc/build.sh"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
CRYPTOGRAPHY = PINNED["cryptography"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Somebody's, with a file in it and a space in its name."""
    directory = tmp_path / "my builds"
    directory.mkdir()
    (directory / "letter").write_text("dear")
    return directory


def programs(tmp_path: Path, python: str, **others: str) -> dict[str, str]:
    """An environment in which these scripts are found first."""
    for name, script in {"cargo": "exit 1", "cc": "exit 1", "python": python, **others}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": str(tmp_path / "bin/python")}


def build(environment: dict[str, str], *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", str(SCRIPT), *map(str, arguments)], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_lock_is_of_the_version_that_is_pinned() -> None:
    locked = {package["name"]: package["version"] for package in tomllib.loads((SCRIPT.parent / "Cargo.lock").read_text())["package"]}
    assert locked["cryptography-rust"].startswith(f"0.{CRYPTOGRAPHY.partition('.')[0]}."), (
        "sh deploy/images/aws-lc/build.sh DIRECTORY relock"
    )


@pytest.mark.parametrize("arguments", [(), ("one", "relok"), ("one", "relock", "two")])
def test_wrong_arguments_are_told_and_nothing_is_touched(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = build(programs(tmp_path, "exit 1"), *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: " in done.stderr
    assert not (tmp_path / "one").exists()


def test_a_build_that_fails_leaves_what_was_there_and_nothing_that_is_taken_for_a_build(tmp_path: Path, directory: Path) -> None:
    done = build(programs(tmp_path, 'echo "no venv" >&2; exit 1'), directory, cwd=tmp_path)
    assert done.returncode == 1
    assert "no venv" in done.stderr
    assert [path.name for path in directory.iterdir()] == ["letter"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, directory: Path) -> None:
    environment = programs(tmp_path, 'mkdir -p "$3"; echo begun >&2; exec sleep 60')
    with subprocess.Popen(["sh", str(SCRIPT), str(directory)], env=environment, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"begun\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 130
    assert [path.name for path in directory.iterdir()] == ["letter"]


def test_without_rust_it_says_so(tmp_path: Path, directory: Path) -> None:
    environment = programs(tmp_path, "exit 1")
    (tmp_path / "bin/cargo").unlink()
    for name in ("sh", "sed", "dirname", "mkdir", "find", "head", "mktemp", "rm"):
        (tmp_path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    done = build({**environment, "PATH": f"{tmp_path}/bin"}, directory)
    assert done.returncode == 1
    assert "cargo is needed" in done.stderr


def test_what_is_built_already_is_not_built_again_but_that_of_another_version_is(tmp_path: Path, directory: Path) -> None:
    environment = programs(tmp_path, "exit 1")
    wheel = directory / f"wheel/cryptography-{CRYPTOGRAPHY}-cp311-abi3-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert build(environment, directory).returncode == 0
    wheel.rename(wheel.with_name("cryptography-1.0.0-cp311-abi3-any.whl"))
    assert build(environment, directory).returncode == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("value", ["typo", "", "aws-lc openssl"])
def test_make_refuses_another_library_than_the_two(value: str) -> None:
    rules = subprocess.run(["make", "-n", "compiled", f"TLS={value}"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"echo \"TLS is aws-lc or openssl; it was '{value}'\" >&2; exit 1" in rules
