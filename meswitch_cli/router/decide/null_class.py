"""The gate of today: the known prompts near by, and a class of its own for prompts of other fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meswitch_cli.router.decide.head import Head
from meswitch_cli.router.decide.neighbours import NeighbourGate


@dataclass(frozen=True, kw_only=True)
class NullClassGate(NeighbourGate):
    """Two opinions that err on different prompts: of the nearest known prompts, and of a linear head on everything.

    Each is divided by its usual deviation and both count alike. Weights fitted on the general prompts favour the head,
    which has learnt those prompts' own style, and do worse on other people's (docs/results/router.md).

    Attributes:
        null: scores of every expert's field and, last, of any other, `[labels + 1, d]`.
        deviations: `[2]` of the neighbours' opinion and of the head's, over prompts that neither has seen.
    """

    null: Head
    deviations: torch.Tensor

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """`[n, d]` scaled features to `[n]` from 0 (an expert's own) to 1 (another field's); 1/2: as near to both."""
        return joint_distances(super().distances(features), null_log_odds(self.null(features)), self.deviations)

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | {
            "gate.null_weight": self.null.weight.half(),
            "gate.null_bias": self.null.bias,
            "gate.deviations": self.deviations,
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> NullClassGate:
        near = NeighbourGate.from_parts(tensors, numbers)
        return cls(
            near.directions,
            near.points,
            near.owners,
            near.threshold,
            near.strict_threshold,
            null=Head(tensors["gate.null_weight"].float(), tensors["gate.null_bias"]),
            deviations=tensors["gate.deviations"],
        )

    @staticmethod
    def shapes(labels: int, size: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        """Of the tensors, as `NeighbourGate.shapes`, which says what it raises."""
        return NeighbourGate.shapes(labels, size, tensors) | {
            "gate.null_weight": (labels + 1, size),
            "gate.null_bias": (labels + 1,),
            "gate.deviations": (2,),
        }


def null_log_odds(scores: torch.Tensor) -> torch.Tensor:
    """Scores `[n, labels + 1]` to the log odds `[n]` of the last class against all others."""
    return scores[:, -1] - scores[:, :-1].logsumexp(1)


def joint_distances(near: torch.Tensor, log_odds: torch.Tensor, deviations: torch.Tensor) -> torch.Tensor:
    """Distances of `NeighbourGate`, and log odds, each around 0 by its deviation: their mean, from 0 to 1."""
    return torch.sigmoid(((near - 0.5) / deviations[0] + log_odds / deviations[1]) / 2)
