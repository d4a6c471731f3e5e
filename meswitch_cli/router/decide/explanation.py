"""Why a prompt goes where it goes: both gates' figures and the known prompts nearest to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.decide.neighbours import NeighbourGate


@dataclass(frozen=True)
class Neighbour:
    """A known prompt near the one that is asked about.

    Attributes:
        point: its index among the gate's points.
        owner: the expert whose it is, None for a prompt of another field.
        similarity: cosine, 1 for the same.
    """

    point: int
    owner: str | None
    similarity: float


@dataclass(frozen=True)
class Explanation:
    """The figures of a decision.

    Attributes:
        distance, confidence: of the prompt; distance_threshold, strict_distance_threshold, confidence_threshold: the
            lines that they are held against.
        nearest: the known prompts, nearest first; none of a router of format version 1.
    """

    distance: float
    distance_threshold: float
    strict_distance_threshold: float
    confidence: float
    confidence_threshold: float
    nearest: tuple[Neighbour, ...]


def explain(model: RouterModel, features: torch.Tensor, count: int = 5) -> Explanation:
    """Explain what becomes of a prompt by its features, `[1, d]`."""
    judged = model.judge(features)[0]
    nearest: tuple[Neighbour, ...] = ()
    if isinstance(model.gate, NeighbourGate):
        similarities = model.gate.similarities(model.scaling(features))[0]
        top = similarities.topk(min(count, len(similarities)))
        nearest = tuple(
            Neighbour(index, model.labels[owner] if owner >= 0 else None, float(value))
            for index, value in zip(top.indices.tolist(), top.values, strict=True)
            for owner in [int(model.gate.owners[index])]
        )
    return Explanation(
        judged.distance,
        model.distance_threshold("normal"),
        model.distance_threshold("strict"),
        judged.confidence,
        model.confidence_threshold,
        nearest,
    )
