"""What is said of the machine and its programs."""

from __future__ import annotations

import pytest

from benches.machine import describe_ztunnel

TOLD = (
    'version.BuildInfo{Version:"unknown", GitRevision:"62d826530e5c", RustVersion:"1.95.0", BuildProfile:"release", '
    'BuildStatus:"Clean", IstioVersion:"unknown", CryptoProvider:"tls-aws-lc"}\n'
)


@pytest.mark.parametrize(("told", "short"), [
    (TOLD, "62d826530e5c, tls-aws-lc"),
    (TOLD.replace("62d826530e5c", ""), "unknown, tls-aws-lc"),
    ("", "of unknown version"),
    ("x" * 9999, "of unknown version"),
])  # fmt: skip
def test_a_ztunnel_is_named_by_revision_and_tls(told: str, short: str) -> None:
    assert describe_ztunnel(told) == short
