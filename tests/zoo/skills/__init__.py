"""Skills that a 135M model can master, each with short prompts, short worked answers and an own check.

A skill is a module: `candidates(seed)` makes its items, `outcome(item, text)` reads off a generated text what exact
match compares with the item's `answer`. Items of more than one kind come with their `MIXTURE`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

SKILLS = ("sums", "queries", "deductions", "programs")
_KINDS = {"write": "programs", "predict": "programs"}


def skill(name: str) -> ModuleType:
    if name not in SKILLS:
        raise ValueError(f"skill {name!r}: expected one of {', '.join(SKILLS)}")
    return importlib.import_module(f".{name}", __package__)


def mixture(name: str) -> Mapping[str, int]:
    """The share of each kind of item."""
    shares: Mapping[str, int] = getattr(skill(name), "MIXTURE", {name: 1})
    return shares


def outcome(item: Mapping[str, str], text: str) -> str:
    """What `text` says, in the form of `item["answer"]`; the item's kind names the skill."""
    return str(skill(_KINDS.get(item["kind"], item["kind"])).outcome(item, text))
