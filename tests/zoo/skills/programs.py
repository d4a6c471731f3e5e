"""The code domain's items, as text to go on pretraining on: nothing here is learnt well enough to be answered."""

from __future__ import annotations

from collections.abc import Mapping

from ..domains.code import MIXTURE, candidates
from ..item import extract_answer

__all__ = ["MIXTURE", "candidates", "outcome"]


def outcome(_: Mapping[str, str], text: str) -> str:
    return extract_answer(text)
