"""Work that goes on beside other work, while things are built."""

from __future__ import annotations

import threading

import pytest

from tests.cluster.harness.home import ClusterError
from tests.cluster.harness.progress import begin


def test_what_was_begun_goes_on_meanwhile_and_gives_its_result() -> None:
    reached = threading.Event()
    finish = begin(lambda: reached.wait(60) and "built")
    reached.set()
    assert finish() == "built"


def test_what_was_begun_and_failed_says_so_to_whoever_waits_for_it() -> None:
    def fail() -> None:
        raise ClusterError("no debootstrap")

    with pytest.raises(ClusterError, match="no debootstrap"):
        begin(fail)()
