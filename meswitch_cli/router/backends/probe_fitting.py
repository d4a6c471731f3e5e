"""Choosing the layer that the probe reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

#: Depths tried where none is given, as shares of the base's layers. Deeper ones did no better on other people's
#: prompts (docs/results/router.md).
DEPTHS = (1 / 6, 1 / 4, 1 / 3, 2 / 5, 1 / 2)
#: A deeper layer must be better by this much: its decisions are slower.
LEAST_GAIN = 0.005
#: Of layers that err alike a deeper one must hold the domains apart by this share more. On the zoo the ratio is highest
#: at the layer that errs least on other people's prompts (docs/results/router.md).
LEAST_SEPARATION_GAIN = 0.05


def layers_to_try(num_hidden_layers: int) -> list[int]:
    """The layers nearest to `DEPTHS`, 1 the first."""
    return sorted({max(1, round(num_hidden_layers * share)) for share in DEPTHS})


def best_layer(badness: Mapping[int, float], separation: Mapping[int, float] | None = None) -> int:
    """The shallowest of the layers that err as little as the best (`LEAST_GAIN`) and hold the domains as far apart.

    Args:
        separation: by layer, `fisher_ratio`; it decides where several layers make no mistake.
    """
    least = min(badness.values())
    good = [layer for layer, value in badness.items() if value <= least + LEAST_GAIN]
    if separation is None:
        return min(good)
    furthest = max(separation[layer] for layer in good)
    return min(layer for layer in good if separation[layer] >= (1 - LEAST_SEPARATION_GAIN) * furthest)


def fisher_ratio(features: torch.Tensor, labels: torch.Tensor) -> float:
    """How far apart the classes lie: variance of their centres over the mean variance inside them (Fisher, 1936).

    Args:
        features: `[n, d]`; labels: `[n]` class of each.
    """
    classes = torch.unique(labels)
    centres = torch.stack([features[labels == label].mean(0) for label in classes])
    within = torch.stack(
        [
            (features[labels == label] - centre).square().sum(1).mean()
            for label, centre in zip(classes, centres, strict=True)
        ]
    )
    return float((centres - centres.mean(0)).square().sum(1).mean() / within.mean().clamp_min(1e-12))
