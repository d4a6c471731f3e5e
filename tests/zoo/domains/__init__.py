"""What each expert is trained on: `candidates(name, seed)` and its mixture of kinds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

from ..item import Item

EXPERTS = ("maths", "code", "logic")


def candidates(name: str, seed: int) -> list[Item]:
    return _domain(name).candidates(seed)


def mixture(name: str) -> Mapping[str, int]:
    return _domain(name).MIXTURE


def _domain(name: str) -> ModuleType:
    """Imported late: the tiny family, which most tests use, needs none of the generators."""
    if name not in EXPERTS:
        raise ValueError(f"domain {name!r}: expected one of {', '.join(EXPERTS)}")
    return importlib.import_module(f".{name}", __package__)
