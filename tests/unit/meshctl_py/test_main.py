"""The command line as a whole."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from meshctl_py.__main__ import main


def test_a_terminal_without_unicode_gets_what_it_can_show(tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n")
    result = CliRunner(charset="latin-1").invoke(main, ["waypoint", "apply", "-n", "shop", "-f", str(tmp_path)])
    assert (result.output, result.exit_code) == ("? waypoint shop/waypoint applied\n", 0)
