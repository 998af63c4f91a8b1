import os
import subprocess

from tests.conftest import find_orphans


def test_labs_of_test_processes_that_are_no_more_are_orphans() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    labs = [f"test-{os.getpid()}-faults0", f"test-{gone.pid}-faults0", f"demo-{gone.pid}", "shop", f"test-{gone.pid}"]
    assert find_orphans(labs) == [f"test-{gone.pid}-faults0"]
