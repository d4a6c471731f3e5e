"""A few of a model's tensors, and of their rows: what tells how an expert is best stored."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from meswitch_cli.delta.stored import projection_of
from meswitch_cli.model.matching import PlannedTensor

#: Tensors of a projection that are looked at, the first and the last among them.
SAMPLED = 3


def by_projection(items: Iterable[PlannedTensor]) -> Mapping[tuple[str, str], list[PlannedTensor]]:
    """Tensors by their kind and the last part of their name, in order."""
    found: dict[tuple[str, str], list[PlannedTensor]] = defaultdict(list)
    for item in items:
        found[item.kind, projection_of(item.name)].append(item)
    return found


def spread(items: list[PlannedTensor]) -> list[PlannedTensor]:
    """A few, the first and the last among them."""
    places = {round(number * (len(items) - 1) / (SAMPLED - 1)) for number in range(SAMPLED)}
    return [items[place] for place in sorted(places)]


def some_rows(tensor: torch.Tensor, weights: int) -> torch.Tensor:
    """Rows that are spread evenly over a tensor, about as many as have so many weights."""
    return tensor[:: max(1, math.ceil(tensor.numel() / weights))].contiguous() if tensor.dim() else tensor
