"""One request's way through a model of transformers, as its `generate` goes it, a step at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Decoding:
    """Ids, and what is kept between steps: keys and values, states, positions."""

    def __init__(self, model: Any, tokens: Sequence[int], longest: int) -> None:
        """`longest` tokens are the most that prompt and answer have together."""
        from transformers import GenerationConfig

        self._model = model
        self._ids = torch.tensor([list(tokens)], device=model.device)
        self._kept: dict[str, Any] = {"use_cache": True}
        model._prepare_cache_for_generation(GenerationConfig(), self._kept, None, 1, longest)
        if "position_ids" in inspect.signature(model.forward).parameters:
            self._kept["position_ids"] = model._prepare_position_ids_for_generation(self._ids, self._kept)
        self._begun = False

    def forward(self, every: bool = False) -> Tensor:
        """Logits `[tokens, vocabulary]` of what is new: the prompt first, then what `push` added.

        Those of the last token alone where the model can leave out the others and not `every` one is asked for.
        """
        first = {"is_first_iteration": True} if not self._begun else {"next_sequence_length": 1}
        inputs = self._model.prepare_inputs_for_generation(self._ids, **first, **self._kept)
        if not every and self._model._supports_logits_to_keep():
            inputs["logits_to_keep"] = 1
        outputs = self._model(**inputs, return_dict=True)
        self._kept = self._model._update_model_kwargs_for_generation(outputs, self._kept)
        self._begun = True
        logits: Tensor = outputs.logits[0]
        return logits

    def push(self, token: int) -> None:
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token]])], 1)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return _nbytes(self._kept, set())


def _nbytes(value: Any, seen: set[int]) -> int:
    """Of the tensors in lists, dictionaries and transformers' own objects."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, list | tuple | set):
        return sum(_nbytes(item, seen) for item in value)
    if isinstance(value, dict):
        return sum(_nbytes(item, seen) for item in value.values())
    if type(value).__module__.startswith("transformers.") and not isinstance(value, nn.Module):
        return _nbytes(getattr(value, "__dict__", {}), seen)
    return 0
