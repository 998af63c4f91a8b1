"""The reference documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from mesh.model import ports
from mesh.runtime.env import describe
from ztunnel_py.config import AgentConfig

DOCS = Path(__file__).parents[3] / "docs"


def test_every_variable_of_the_agent_is_documented_with_its_default() -> None:
    text = (DOCS / "reference" / "ztunnel.md").read_text()
    for variable in describe(AgentConfig):
        row = next((line for line in text.splitlines() if line.startswith(f"| `{variable.names[0]}`")), "")
        assert variable.doc in row, variable.names[0]
        if variable.default is not None:
            assert f"`{variable.default}`" in row


def test_every_documented_port_is_the_one_in_the_code() -> None:
    documented = set(map(int, re.findall(r"^\| (15\d{3}) \|", (DOCS / "reference" / "ports.md").read_text(), re.MULTILINE)))
    in_code = {value for name, value in vars(ports).items() if name.isupper() and isinstance(value, int) and 15000 <= value < 15100}
    assert documented == in_code
