"""The table of families is whole, and holds none that the engine serves wrongly."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_every_family_is_equal_or_refused_with_a_reason() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert {row[0] for row in rows} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for family, compresses, served, equal, reason in rows:
        assert (served, equal.strip()) in (("yes", "equal"), ("refused", "")), family
        assert (compresses == "yes" and not reason) if served == "yes" else reason.strip(), family
    assert f"{len(rows)} families" in PAGE.read_text()
