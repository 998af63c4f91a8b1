"""The rights in the page on security are those of the manifests, no more and no fewer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[3]
SECTIONS = re.split(r"^## ", (ROOT / "docs/reference/security.md").read_text(), flags=re.MULTILINE)
CNI = "ambient-mesh-ztunnel-cni"

Right = tuple[str, str, str, bool]
"""Resource, name of the object or none, verb, whether in the mesh's namespace alone."""


def written(title: str) -> list[Right]:
    """What the table of rights in this section says."""
    section = next(section for section in SECTIONS if section.startswith(title))
    table = section.partition("| API server | verbs | why |")[2].partition("\n\n")[0]
    rights = []
    for row in table.splitlines()[2:]:
        resources, verbs, why = (cell.strip() for cell in row.strip("|").split("|"))
        resources, _, name = resources.partition(": ")
        for resource in resources.split(", "):
            rights += [(resource, name.strip("`"), verb, why.startswith("here;")) for verb in verbs.split(", ")]
    return rights


def granted(path: str, *, cni: bool = False) -> list[Right]:
    rights = []
    for document in YAML(typ="safe", pure=True).load_all((ROOT / path).read_text()):
        if document["kind"] in ("Role", "ClusterRole") and (document["metadata"]["name"] == CNI) == cni:
            for rule in document["rules"]:
                for resource in rule["resources"]:
                    for name in rule.get("resourceNames", [""]):
                        rights += [(resource, name, verb, document["kind"] == "Role") for verb in rule["verbs"]]
    return rights


@pytest.mark.parametrize(
    ("title", "path", "cni"),
    [
        ("The agent", "deploy/daemonset/rbac.yaml", False),
        ("The CNI plugin", "deploy/daemonset/rbac.yaml", True),
        ("The control plane", "deploy/control-plane/rbac.yaml", False),
    ],
)
def test_the_rights_of_each_program_are_written_down_once(title: str, path: str, cni: bool) -> None:
    assert sorted(written(title)) == sorted(granted(path, cni=cni))
