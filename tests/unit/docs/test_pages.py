"""What the pages point to is there: links with their anchors, files, modules, targets of make; and each decision has its number."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in ("docs", "deploy", "examples") for page in (ROOT / name).rglob("*.md"))])
PACKAGES = ("mesh", "ztunnel_py", "istiod_py", "meshctl_py", "waypoint_py")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings: lower case, punctuation dropped, spaces to dashes."""
    headings = re.findall(r"^#+ +(.*?)\s*$", without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_there(dotted: str) -> bool:
    """Whether a module, or a name in one, has this name."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_no_link_is_broken(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_modules_and_targets_that_are_named_are_there(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    quoted = re.findall(r"`([^`\n]+)`", without_blocks(text))
    paths = [name for name in quoted if re.fullmatch(r"(tests|docs|deploy|examples|mesh|benches)/[\w./-]+", name)]
    missing = [name for name in paths if not (ROOT / name).exists()]
    missing += [name for name in quoted if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", name) and not is_there(name)]
    missing += [f"make {name}" for name in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE) if name not in targets]
    assert not missing


def test_the_targets_that_help_lists_are_in_contributing() -> None:
    listed = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"help"}
    assert set(re.findall(r"^    make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)) == listed


def test_decisions_are_numbered_without_gaps_and_the_architecture_links_each() -> None:
    pages = sorted((ROOT / "docs/design/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    assert [page.read_text().partition(".")[0] for page in pages] == [f"# {number}" for number in range(1, len(pages) + 1)]
    text = (ROOT / "docs/design/ARCHITECTURE.md").read_text()
    assert [page.name for page in pages if f"decisions/{page.name}" not in text] == []


def test_each_dependency_has_its_reason_and_no_other_has() -> None:
    needed = {re.split(r"[<>=]", line)[0] for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    cells = re.findall(r"^\| ([\w., -]+?) \|", (ROOT / "docs/design/decisions/0002-dependencies.md").read_text(), re.MULTILINE)[1:]
    assert sorted(name for cell in cells for name in cell.split(", ")) == sorted(needed)
