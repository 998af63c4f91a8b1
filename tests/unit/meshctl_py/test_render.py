"""What is shown of a lab."""

from __future__ import annotations

import pytest

from meshctl_py.lab.status import LabStatus, Problem
from meshctl_py.render import MEANWHILE, show_status

MISTAKE = Problem("policy.yaml", 14, "spec.rules[0].from[0].source.principal", "unknown field; did you mean 'principals'?")


def test_mistakes_are_counted_and_what_holds_meanwhile_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    show_status(LabStatus("mine", "dir", "logs", "ready", problems=(MISTAKE,)))
    assert capsys.readouterr().out.splitlines()[-3:] == ["1 problem in the source:", f"  {MISTAKE}", MEANWHILE]


def test_a_source_without_mistakes_is_not_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    show_status(LabStatus("mine", "dir", "logs", "ready"))
    assert capsys.readouterr().out == "lab mine  source dir  logs logs\n"
