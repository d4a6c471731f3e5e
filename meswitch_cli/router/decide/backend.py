"""What a decision needs of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch


class FeatureSource(ABC):
    """Prompts to features. One object serves training and serving alike, so the two cannot differ.

    Attributes:
        size: dimensions of a feature vector.
        max_tokens: of a prompt; more are cut from its middle.
    """

    size: int
    max_tokens: int

    @abstractmethod
    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = lambda count: None) -> torch.Tensor:
        """`[n, size]` fp32; `on_done` hears how many prompts are newly done."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt before anything is cut; of a very long one, a lower bound."""
