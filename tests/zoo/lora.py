"""Low-rank adapters on a model's linears (LoRA, arXiv 2106.09685), merged into them when trained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapted(nn.Module):
    """`linear(x) + up(down(x)) * 2`: the usual scale, alpha = 2 rank. The linear itself is frozen."""

    scale = 2.0

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)
        return self.linear(inputs) + self.scale * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.linear.weight += self.scale * (self.up @ self.down)
        return self.linear


def adapt(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze the model and put an adapter on every linear of its decoder layers."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Adapted(child, rank))


def merge(model: PreTrainedModel) -> None:
    """Undo `adapt`, keeping what was learnt."""
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Adapted):
                setattr(parent, name, child.merged())
    model.requires_grad_(True)
