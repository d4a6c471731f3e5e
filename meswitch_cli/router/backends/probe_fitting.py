"""Choosing the layer that the probe reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from meswitch_cli.router.backends.contract import LabelledTexts
from meswitch_cli.router.decide.head import Scaling, choose_head

#: Depths tried where none is given, as shares of the base's layers.
DEPTHS = (1 / 6, 1 / 4, 1 / 3, 1 / 2)


def layers_to_try(num_hidden_layers: int) -> list[int]:
    """The layers nearest to `DEPTHS`, 1 the first."""
    return sorted({max(1, round(num_hidden_layers * share)) for share in DEPTHS})


def validation_losses(
    pooled: Mapping[str, Mapping[int, torch.Tensor]], parts: Mapping[str, LabelledTexts]
) -> dict[int, tuple[int, float]]:
    """Errors, and the cross-entropy (nats), on validation of a head fitted on train, by layer.

    Args:
        pooled: features `[n, hidden]` of the two parts, by layer.
    """
    targets, validation = parts["train"].targets, parts["validation"]
    useful = targets.sum(1) > 0
    losses = {}
    for layer, train in pooled["train"].items():
        scaling = Scaling.standard(train)
        held_out = scaling(pooled["validation"][layer])
        head, _, loss = choose_head(scaling(train)[useful], targets[useful], held_out, validation.targets)
        losses[layer] = int((head(held_out).argmax(1) != validation.labels).sum()), loss
    return losses


def best_layer(losses: Mapping[int, tuple[int, float]]) -> int:
    """Of the layers with the fewest errors the shallowest: its decisions are the fastest."""
    return min(losses, key=lambda layer: (losses[layer][0], layer))
