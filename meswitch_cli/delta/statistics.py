"""What calibration tells the quantiser about the inputs of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a linear layer's inputs over the calibration tokens.

    Attributes:
        energy: `[in]` fp32, the sum over tokens of x_i squared.
        gram: `[in, in]` fp32, the sum over tokens of x x^T, where a setting needs it.
        tokens: how many tokens were seen.
        inputs: `[tokens, in]` fp32, the inputs themselves, where there are so few that they say it shorter.
    """

    energy: torch.Tensor
    gram: torch.Tensor | None
    tokens: int
    inputs: torch.Tensor | None = None
