"""The linear head: multinomial logistic regression on scaled features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional

#: Strengths of the L2 penalty tried on validation, strongest first: of equals the strongest is taken.
PENALTIES = (1.0, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
MAX_ITERATIONS = 100


@dataclass(frozen=True)
class Scaling:
    """features -> (features - mean) / scale; `[d]` both."""

    mean: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def identity(cls, size: int) -> Scaling:
        return cls(torch.zeros(size), torch.ones(size))

    @classmethod
    def standard(cls, features: torch.Tensor) -> Scaling:
        """To mean 0 and deviation 1 in every dimension; a constant dimension is only centred."""
        deviation = features.std(0)
        return cls(features.mean(0), torch.where(deviation > 1e-6, deviation, 1.0))

    @classmethod
    def overall(cls, features: torch.Tensor) -> Scaling:
        """To a root mean square of 1 over all dimensions together: a rare word keeps its small weight."""
        scale = features.square().mean().sqrt().clamp_min(1e-6)
        return cls(torch.zeros(features.shape[1]), scale.expand(features.shape[1]).clone())

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.scale


@dataclass(frozen=True)
class Head:
    """scores = features · weightᵀ + bias; `[labels, d]` and `[labels]`, fp32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weight.T + self.bias


def fit_head(features: torch.Tensor, targets: torch.Tensor, penalty: float, start: Head | None = None) -> Head:
    """Minimise cross-entropy + penalty/2 · ‖weight‖² by L-BFGS.

    Args:
        features: `[n, d]` scaled.
        targets: `[n, labels]` probabilities; rows of certain examples are one-hot.
        start: where the search begins, zero if not given; there is one minimum.
    """
    labels = targets.shape[1]
    begin = start or Head(torch.zeros(labels, features.shape[1]), torch.zeros(labels))
    weight, bias = (tensor.clone().requires_grad_() for tensor in (begin.weight, begin.bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(features @ weight.T + bias, targets) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Head(weight.detach(), bias.detach())


def cross_entropy(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over examples of -Σ target · log softmax(score), in nats."""
    return -(targets * functional.log_softmax(scores, dim=1)).sum(1).mean()
