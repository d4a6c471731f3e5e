"""Hidden states of the shared base itself: the router costs a matrix, because the base is there anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from meswitch_cli.errors import RouterError
from meswitch_cli.router.backends.base import PooledHiddenStates
from meswitch_cli.router.backends.contract import (
    NULL,
    Backend,
    FitRequest,
    FittedBackend,
    LabelledTexts,
    SavedBackend,
)
from meswitch_cli.router.backends.probe_fitting import best_layer, fisher_ratio, layers_to_try
from meswitch_cli.router.backends.read_ahead import ReadBatches
from meswitch_cli.router.backends.texts import encode, native_dtype
from meswitch_cli.router.decide.conversation import clip_characters
from meswitch_cli.router.decide.head import Scaling

#: Prompts of one call: progress is told after each, and a serving engine is not held for long.
CHUNK = 32


class Probe(Backend):
    """Mean-pooled hidden states after decoder layer `layer`, scaled to length 1: in deep layers a few dimensions grow.

    Prompts go in as plain text through the base's tokenizer, without a chat template: experts have templates of their
    own, and which one applies is what is to be found out.
    """

    title = "probe"
    needs_base = True

    def __init__(
        self,
        hidden_states: PooledHiddenStates,
        tokenizer: Any,
        *,
        layer: int,
        size: int,
        max_tokens: int,
        unit_length: bool = True,
    ) -> None:
        self._hidden_states = hidden_states
        self._tokenizer = tokenizer
        self.layer = layer
        self.size = size
        self.max_tokens = max_tokens
        self.unit_length = unit_length

    @classmethod
    def fit(cls, request: FitRequest) -> FittedBackend:
        base, settings, parts = request.base, request.settings, request.parts
        assert base is not None
        layers = base.num_hidden_layers
        tried = [settings.layer] if settings.layer else layers_to_try(layers)
        hidden_states, tokenizer = base.hidden_states(max(tried)), base.tokenizer()
        advance = request.counted("hidden states")
        pooled: dict[str, dict[int, torch.Tensor]] = {}
        read = ReadBatches(request.read_ahead, f"{base.fingerprint} {native_dtype()}") if request.read_ahead else None
        for name, part in parts.items():
            token_ids = [encode(tokenizer, text, settings.max_tokens) for text in part.texts]
            found = hidden_states.pooled_at(token_ids, tried, advance, read)
            pooled[name] = {layer: normalize(values, dim=1) for layer, values in found.items()}
        several = tried if len(tried) > 1 else ()
        badness = {layer: request.badness({name: pooled[name][layer] for name in pooled}) for layer in several}
        separation = {layer: _separation(parts["train"], pooled["train"][layer]) for layer in badness}
        layer = best_layer(badness, separation) if badness else tried[0]
        size = int(hidden_states.hidden_size)
        probe = cls(hidden_states, tokenizer, layer=layer, size=size, max_tokens=settings.max_tokens)
        return FittedBackend(
            backend=probe,
            features={name: by_layer[layer] for name, by_layer in pooled.items()},
            standardise=True,
            notes={
                "layers": layers,
                "badness_by_layer": {str(item): value for item, value in badness.items()},
                "fisher_ratio_by_layer": {str(item): value for item, value in separation.items()},
            },
        )

    @classmethod
    def load(cls, saved: SavedBackend) -> Probe:
        assert saved.base is not None
        numbers = {name: saved.number(name) for name in ("layer", "size", "max_tokens")}
        unit_length = saved.settings.get("unit_length") is True  # version 1 took the mean as it is
        hidden_states = saved.base.hidden_states(numbers["layer"])
        return cls(hidden_states, saved.base.tokenizer(), **numbers, unit_length=unit_length)

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
        return normalize(pooled, dim=1) if self.unit_length else pooled

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(clip_characters(text, self.max_tokens)))

    def settings(self) -> dict[str, Any]:
        return {"layer": self.layer, "size": self.size, "max_tokens": self.max_tokens, "unit_length": self.unit_length}


def _separation(part: LabelledTexts, features: torch.Tensor) -> float:
    """Fisher's ratio of the prompts whose label is certain, every dimension scaled to deviation 1."""
    certain = part.labels != NULL
    return fisher_ratio(Scaling.standard(features)(features)[certain], part.labels[certain])


BACKEND = Probe
