"""The page about waypoints names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from mesh.model.labels import OWN_ANNOTATIONS, OWN_DOMAIN

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "waypoints.md"


def test_the_annotations_of_our_own_are_all_on_the_page_and_no_others() -> None:
    assert set(re.findall(rf"{re.escape(OWN_DOMAIN)}[\w-]+", PAGE.read_text())) == OWN_ANNOTATIONS
