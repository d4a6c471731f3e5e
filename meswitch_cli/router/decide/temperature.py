"""How sure scores are: one temperature, fitted on prompts the head never saw (Guo et al., arXiv 1706.04599)."""

from __future__ import annotations

import torch

from meswitch_cli.router.decide.head import cross_entropy

LOWEST, HIGHEST = 1e-2, 1e3
_STEPS = 60


def fit_temperature(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature T that minimises the cross-entropy of softmax(scores / T).

    Targets are smoothed as Platt did (1999): with n prompts the right label counts (n + 1)/(n + 2), so that scores
    without a single mistake do not end in certainty.

    Args:
        scores: `[n, labels]` fp32; labels: `[n]` indices.
    """
    count, classes = scores.shape
    missing = 1 / (count + 2)
    targets = torch.full((count, classes), missing / max(1, classes - 1))
    targets[torch.arange(count), labels] = 1 - missing
    low, high = torch.tensor(LOWEST).log().item(), torch.tensor(HIGHEST).log().item()
    golden = (5**0.5 - 1) / 2

    def loss(log_temperature: float) -> float:
        return float(cross_entropy(scores / torch.tensor(log_temperature).exp(), targets))

    # Golden-section search: the loss is convex in 1/T, so it has one minimum in log T too.
    left, right = high - golden * (high - low), low + golden * (high - low)
    left_loss, right_loss = loss(left), loss(right)
    for _ in range(_STEPS):
        if left_loss < right_loss:
            high, right, right_loss = right, left, left_loss
            left = high - golden * (high - low)
            left_loss = loss(left)
        else:
            low, left, left_loss = left, right, right_loss
            right = low + golden * (high - low)
            right_loss = loss(right)
    return float(torch.tensor((low + high) / 2).exp())
