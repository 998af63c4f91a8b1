"""What commands act on, and what they say where there is nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshctl_py.__main__ import main
from meshctl_py.lab import home
from meshctl_py.lab.client import Lab
from meshctl_py.lab.home import claim_lab
from meshctl_py.lab.status import LabStatus
from meshctl_py.target import find_follower


@pytest.fixture(autouse=True)
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither kubeconfig nor lab."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(home, "own_labs", lambda: tmp_path / "labs")


@pytest.mark.parametrize(
    "arguments", [("waypoint", "list"), ("waypoint", "apply", "-n", "shop"), ("label", "namespace", "shop", "a=b"), ("node", "n1", "pods")]
)
def test_who_forgot_to_start_a_lab_is_told_of_labs_too(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "no lab is running ('meshctl lab up DIR' starts one), and there is no kubeconfig (" in result.output


def test_a_command_for_clusters_says_so_beside_a_lab() -> None:
    _, lock = claim_lab("mine")
    result = CliRunner().invoke(main, ["status"])
    os.close(lock)
    assert result.exit_code == 1
    assert "there is no kubeconfig (" in result.output
    assert "a lab is running (mine), but this is for clusters: see 'meshctl lab --help'" in result.output


def test_a_directory_is_told_from_the_one_that_a_lab_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, lock = claim_lab("mine")
    monkeypatch.setattr(Lab, "status", lambda lab: LabStatus(lab.home.name, str(tmp_path), "", "ready"))
    followed = find_follower(tmp_path)
    assert followed is not None
    assert followed.home == home
    assert find_follower(tmp_path / "labs") is None
    os.close(lock)
    assert find_follower(tmp_path) is None
