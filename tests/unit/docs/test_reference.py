"""The reference documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mesh.model import ports
from mesh.runtime.env import describe
from waypoint_py.config import WaypointConfig
from ztunnel_py.config import AgentConfig

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(("page", "config"), [("ztunnel.md", AgentConfig), ("waypoint.md", WaypointConfig)])
def test_every_variable_is_documented_with_its_default(page: str, config: type[object]) -> None:
    text = (DOCS / "reference" / page).read_text()
    for variable in describe(config):
        row = next((line for line in text.splitlines() if line.startswith(f"| `{variable.names[0]}`")), "")
        assert variable.doc in row, variable.names[0]
        if variable.default:
            assert f"`{variable.default}`" in row


def test_every_documented_port_is_the_one_in_the_code() -> None:
    documented = set(map(int, re.findall(r"^\| (15\d{3}) \|", (DOCS / "reference" / "ports.md").read_text(), re.MULTILINE)))
    in_code = {value for name, value in vars(ports).items() if name.isupper() and isinstance(value, int) and 15000 <= value < 15100}
    assert documented == in_code
