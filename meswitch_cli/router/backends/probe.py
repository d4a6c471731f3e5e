"""Hidden states of the shared base itself: the router costs a matrix, because the base is there anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router.backends.backend import Kind
from meswitch_cli.router.conversation import clip_characters
from meswitch_cli.router.features import HiddenStates, encode

#: Prompts of one call: progress is told after each, and a serving engine is not held for long.
CHUNK = 32


class Probe:
    """Mean-pooled hidden states after decoder layer `layer`.

    Prompts go in as plain text through the base's tokenizer, without a chat template: experts have templates of their
    own, and which one applies is what is to be found out.
    """

    kind: Kind = "probe"
    extendable = True

    def __init__(self, hidden_states: HiddenStates, tokenizer: Any, *, layer: int, size: int, max_tokens: int) -> None:
        self._hidden_states = hidden_states
        self._tokenizer = tokenizer
        self.layer = layer
        self.size = size
        self.max_tokens = max_tokens

    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = lambda count: None) -> torch.Tensor:
        token_ids = [encode(self._tokenizer, text, self.max_tokens) for text in texts]
        # Like lengths together, then back in their order.
        order = sorted(range(len(texts)), key=lambda index: len(token_ids[index]))
        pooled = torch.empty(len(texts), self.size)
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            found = self._hidden_states.pooled_hidden_states([token_ids[index] for index in chunk], self.layer)
            if found.shape != (len(chunk), self.size):
                raise RouterError(
                    f"hidden states of {list(found.shape)} where {[len(chunk), self.size]} are needed: "
                    "the router was trained on another base"
                )
            pooled[chunk] = found
            on_done(len(chunk))
        return pooled

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(clip_characters(text, self.max_tokens)))

    def settings(self) -> dict[str, Any]:
        return {"layer": self.layer, "size": self.size, "max_tokens": self.max_tokens}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def save_model(self, folder: Path) -> None:
        """The base is its model, and lies elsewhere."""
