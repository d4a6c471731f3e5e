"""What each expert is trained on: `candidates(name, seed)` and its mixture of kinds."""

from __future__ import annotations

from collections.abc import Mapping

from ..item import Item
from . import code, logic, maths

EXPERTS = ("maths", "code", "logic")
_MODULES = {"maths": maths, "code": code, "logic": logic}


def candidates(name: str, seed: int) -> list[Item]:
    return _MODULES[name].candidates(seed)


def mixture(name: str) -> Mapping[str, int]:
    return _MODULES[name].MIXTURE
