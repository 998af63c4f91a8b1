"""What is built once, and who owns the name of a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cluster.harness.home import ClusterError, building, claim_cluster


def test_what_was_interrupted_while_being_built_is_built_anew(tmp_path: Path) -> None:
    def build_half() -> None:
        with building(tmp_path / "thing") as directory:
            assert directory is not None
            (directory / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_half()
    assert not (tmp_path / "thing").exists()
    with building(tmp_path / "thing") as directory:
        assert directory is not None
        assert not list(directory.iterdir())
    with building(tmp_path / "thing") as directory:
        assert directory is None


def test_a_name_has_one_cluster_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    home, lock = claim_cluster("one")
    assert home.alive
    with pytest.raises(ClusterError, match="running already"):
        claim_cluster("one")
    os.close(lock)
    assert not home.alive
    os.close(claim_cluster("one")[1])


@pytest.mark.parametrize("name", ["", "UP", "a/b", "-a", "x" * 33])
def test_a_name_that_is_no_directory_and_no_label_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="no name for a cluster"):
        claim_cluster(name)
