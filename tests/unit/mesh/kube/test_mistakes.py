"""The parsers' side of the corpus of mistakes; the API server's is `tests/cluster/test_crds.py`."""

from __future__ import annotations

import pytest

from mesh.kube.checked import check_object
from mesh.kube.objects import Layer, ObjectKey, Origin
from tests.corpus import Mistake, read_mistakes


@pytest.mark.parametrize("mistake", read_mistakes(), ids=str)
def test_a_mistake_is_found_at_its_field(mistake: Mistake) -> None:
    raw = mistake.manifest
    found = check_object(raw["apiVersion"], ObjectKey(mistake.kind, "shop", "mistaken"), raw, (Layer(Origin("x", 0, 0), raw),))
    assert mistake.field in {problem.field for problem in found.problems}
