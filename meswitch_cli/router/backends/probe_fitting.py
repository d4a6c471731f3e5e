"""Choosing the layer that the probe reads."""

from __future__ import annotations

from collections.abc import Mapping

#: Depths tried where none is given, as shares of the base's layers. Deeper ones did no better on other people's
#: prompts (docs/results/router.md).
DEPTHS = (1 / 6, 1 / 4, 1 / 3, 2 / 5, 1 / 2)
#: A deeper layer must be better by this much: its decisions are slower.
LEAST_GAIN = 0.005


def layers_to_try(num_hidden_layers: int) -> list[int]:
    """The layers nearest to `DEPTHS`, 1 the first."""
    return sorted({max(1, round(num_hidden_layers * share)) for share in DEPTHS})


def best_layer(badness: Mapping[int, float]) -> int:
    """The shallowest layer that is as good as the best, but for `LEAST_GAIN`."""
    least = min(badness.values())
    return min(layer for layer, value in badness.items() if value <= least + LEAST_GAIN)
