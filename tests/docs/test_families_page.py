"""The table of families is whole, and says of each what came out or why nobody can tell."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_every_family_is_served_or_refused_with_a_reason() -> None:
    text = PAGE.read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \|" + r" ([^|]*) \|" * 4 + r" (.*) \|(.*)\|$", text, re.MULTILINE)
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert len(rows) == len({row[0] for row in rows}) and {row[0] for row in rows} <= known
    untold = len(known) - len(rows)
    assert untold == 0 or f"{untold} families have not been run" in text
    for family, compressed, restored, served, vllm, reason, vllm_reason in rows:
        assert compressed in ("yes", "uncalibrated", "no", "not tried"), family
        assert served in ("in batches", "one by one", "refused", "not rerun"), family
        complete = compressed in ("yes", "uncalibrated") and restored == "exact" and served == "in batches"
        assert complete or reason.strip(), family
        assert vllm in ("", "equal") or (vllm in ("refused", "not tried") and vllm_reason.strip()), family
    for way, line in (("in batches", "of these, in batches"), ("one by one", "of these, one request at a time")):
        assert f"| {line} | {sum(row[3] == way for row in rows)} |" in text
    left = sum(row[3] == "not rerun" for row in rows)
    assert not left or f"{left} families that batches do not take have not been tried" in text
    equal = sum(row[3] in ("in batches", "one by one") for row in rows)
    assert f"| served by the embedded engine, tokens equal | {equal} |" in text
    assert f"| served by the engine over vLLM, tokens equal | {sum(row[4] == 'equal' for row in rows)} |" in text
