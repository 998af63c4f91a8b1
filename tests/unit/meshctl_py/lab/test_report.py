"""What the demonstration prints."""

from __future__ import annotations

import pytest

from meshctl_py.lab.demo.report import Report, expect


def test_a_claim_is_a_line_with_what_was_seen_as_it_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.claim_both("it answers", lambda family: expect("200", f"200 from [fd00::{family}]:80"))
    report.claim("it answers long", lambda: "x" * 200)
    report.claim("it answers no more", lambda: expect("200", "503"))
    assert capsys.readouterr().out.splitlines() == [
        'ok     it answers, IPv4: "200 from [fd00::4]:80"',
        'ok     it answers, IPv6: "200 from [fd00::6]:80"',
        f"ok     it answers long: {'x' * 200}",
        "FAILED it answers no more: expected '200', got '503'",
    ]
    assert (report.passed, report.failed) == (3, 1)
