"""Where labs keep their files, and which one is meant."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from meshctl_py.lab import home
from meshctl_py.lab.home import LabError, choose_lab, claim_lab, find_labs, labs_directory, name_from_directory


@pytest.fixture
def labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(home, "own_labs", lambda: tmp_path / "labs")
    return tmp_path / "labs"


def test_root_has_its_labs_in_run_and_others_where_their_session_has_its_files(tmp_path: Path) -> None:
    assert labs_directory({}, 0) == Path("/run/ambient-mesh/lab")
    assert labs_directory({"XDG_RUNTIME_DIR": str(tmp_path)}, 1000) == tmp_path / "ambient-mesh/lab"
    assert labs_directory({"XDG_RUNTIME_DIR": "/gone", "HOME": "/home/a"}, 1000) == Path("/home/a/.cache/ambient-mesh/lab")


@pytest.mark.parametrize(
    ("directory", "name"), [("two-nodes", "two-nodes"), ("My Lab_2", "my-lab-2"), ("___", "lab"), ("x" * 50, "x" * 32)]
)
def test_a_directory_gives_a_lab_its_name(tmp_path: Path, directory: str, name: str) -> None:
    assert name_from_directory(tmp_path / directory) == name


@pytest.mark.parametrize("name", ["", "UPPER", "a/b", "..", "-a", "x" * 33])
def test_a_name_that_is_no_name_is_refused(labs: Path, name: str) -> None:
    with pytest.raises(LabError, match="is no name for a lab"):
        claim_lab(name)


def test_a_claimed_lab_is_alive_until_its_lock_is_gone_and_cannot_be_claimed_twice(labs: Path) -> None:
    claimed, lock = claim_lab("one")
    assert claimed.alive
    with pytest.raises(LabError, match="a lab named one is running already"):
        claim_lab("one")
    os.close(lock)
    assert not claimed.alive


def test_what_a_killed_lab_left_is_removed_when_its_name_is_claimed_again(labs: Path) -> None:
    claimed, lock = claim_lab("one")
    (claimed.logs / "old.log").write_text("old")
    (claimed.path / "control.sock").write_text("")
    os.close(lock)
    again, lock = claim_lab("one")
    assert sorted(path.name for path in again.path.iterdir()) == ["deployed", "files", "lock", "logs", "netns", "status"]
    assert list(again.logs.iterdir()) == []
    os.close(lock)


def test_the_only_running_lab_is_meant_where_none_is_named(labs: Path) -> None:
    with pytest.raises(LabError, match="no lab is running"):
        choose_lab(None)
    _, one = claim_lab("one")
    assert choose_lab(None).name == "one"
    _, two = claim_lab("two")
    with pytest.raises(LabError, match=r"several labs are running \(one, two\): choose one with --name"):
        choose_lab(None)
    with pytest.raises(LabError, match="choose one with --lab"):
        choose_lab(None, "--lab")
    assert choose_lab("two").name == "two"
    with pytest.raises(LabError, match=r"no lab named three is running \(running: one, two\)"):
        choose_lab("three")
    os.close(one)
    assert choose_lab(None).name == "two"
    assert [lab.name for lab in find_labs()] == ["one", "two"]
    os.close(two)


def test_the_lock_is_held_through_an_inherited_descriptor(labs: Path) -> None:
    claimed, lock = claim_lab("one")
    inherited = os.dup(lock)
    os.close(lock)
    assert claimed.alive
    fcntl.flock(inherited, fcntl.LOCK_UN)
    os.close(inherited)
    assert claimed.wait_until_gone(1)


def test_a_directory_without_a_lock_is_a_killed_lab_that_can_be_claimed(labs: Path) -> None:
    (labs / "one" / "status").mkdir(parents=True)
    (found,) = find_labs()
    assert not found.alive
    claimed, lock = claim_lab("one")
    assert claimed.alive
    os.close(lock)
