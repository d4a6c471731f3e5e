"""Prompts of many fields that come with the package: what an expert's own prompts cannot show.

They were written for this package and are under its licence.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from meswitch_cli.router.backends.contract import LabelledTexts
from meswitch_cli.router.decide.head import Scaling
from meswitch_cli.router.store.features import GENERAL, FeatureStore
from meswitch_cli.router.train.data import Example

FILE = Path(__file__).with_name("general.json")


@dataclass(frozen=True)
class General:
    """Prompts of many fields.

    Attributes:
        examples: their group is their field: "law", or "mathematics: algebra" where a wide field has parts.
    """

    examples: tuple[Example, ...]

    @classmethod
    def without(cls, others: Sequence[Example]) -> General:
        """The prompts of the package but for those that the data have as well."""
        known = {example.digest for example in others}
        return cls(tuple(example for example in general_prompts() if example.digest not in known))

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(example.group) for example in self.examples))

    def store(self, texts: LabelledTexts, features: torch.Tensor, scaling: Scaling) -> FeatureStore:
        """They as they are stored; an expert takes the whole of a wide field or nothing, which is its group."""
        fields = self.fields
        groups = tuple(dict.fromkeys(field.partition(":")[0] for field in fields))
        numbers = torch.tensor([fields.index(str(example.group)) for example in self.examples])
        return FeatureStore(
            scaling(features).clamp(-6e4, 6e4).half().float(),
            texts.targets,
            texts.labels,
            torch.full((len(self.examples),), GENERAL, dtype=torch.uint8),
            torch.tensor([example.digest for example in self.examples]),
            torch.tensor([len(example.text) for example in self.examples]),
            numbers,
            torch.tensor([groups.index(field.partition(":")[0]) for field in fields])[numbers],
        )


@functools.cache
def general_prompts() -> tuple[Example, ...]:
    """The prompts of the package, fields together."""
    fields: dict[str, list[str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        Example(text, None, f"{FILE.name}: {field}", field) for field, texts in fields.items() for text in texts
    )
