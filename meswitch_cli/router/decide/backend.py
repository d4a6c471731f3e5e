"""What a decision needs of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch


class FeatureSource(Protocol):
    """Prompts to features. One object serves training and serving alike, so the two cannot differ.

    Attributes:
        size: dimensions of a feature vector.
        max_tokens: of a prompt; more are cut from its middle.
    """

    size: int
    max_tokens: int

    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = ...) -> torch.Tensor:
        """`[n, size]` fp32; `on_done` hears how many prompts are newly done."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt before anything is cut; of a very long one, a lower bound."""
