from pathlib import Path

import click

from istiod_py.__main__ import main

TEXT = (Path(__file__).parents[3] / "docs" / "reference" / "istiod.md").read_text()


def test_every_option_is_documented_with_its_default_and_no_other_is():
    options = {option.opts[-1]: option for option in main.params if isinstance(option, click.Option) and option.opts[-1] != "--version"}
    rows = {line.split("`")[1].split()[0]: line for line in TEXT.splitlines() if line.startswith("| `--")}
    assert rows.keys() == options.keys()
    for name, option in options.items():
        if isinstance(option.default, str | int):
            assert f"| `{option.default}` |" in rows[name], name
