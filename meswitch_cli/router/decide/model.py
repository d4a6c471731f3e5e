"""What was learned: scaling, head, temperature and gates. Scores and distances in, the expert out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.names import GateMode
from meswitch_cli.router.decide.gates import DistanceGate
from meswitch_cli.router.decide.head import Head, Scaling
from meswitch_cli.router.decide.neighbours import NeighbourGate
from meswitch_cli.router.decide.null_class import NullClassGate

Verdict = Literal["routed", "low_confidence", "out_of_domain"]
#: What draws the line between the experts' prompts and others: the prompts near by and a null class, in routers of
#: format version 2 the former alone, and of version 1 the experts' own prompts.
Gate = NullClassGate | NeighbourGate | DistanceGate


@dataclass(frozen=True)
class Judgement:
    """One prompt judged: the label with the highest score, probabilities by label, what the gates say."""

    label: str
    confidence: float
    probabilities: dict[str, float]
    distance: float
    verdict: Verdict


@dataclass(frozen=True)
class RouterModel:
    """Everything that routing needs beside a backend's features.

    Attributes:
        temperature: scores are divided by it before the softmax; being one positive number, it never reorders.
        confidence_threshold: of the calibrated probability; below it a prompt falls back.
        gate: of the distance to the training prompts; beyond it a prompt falls back.
    """

    labels: tuple[str, ...]
    scaling: Scaling
    head: Head
    gate: Gate
    temperature: float
    confidence_threshold: float

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """`[n, d]` features as the backend gives them to `[n, labels]` logits."""
        return self.head(self.scaling(features))

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores / self.temperature, dim=1)

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        return self.gate.distances(self.scaling(features))

    def judge(self, features: torch.Tensor, gate: GateMode = "normal") -> list[Judgement]:
        """Judge prompts by their features, `[n, d]`.

        Raises:
            RouterError: features are not finite.
        """
        if not torch.isfinite(features).all():
            raise RouterError("the features of a prompt are not finite numbers")
        scores = self.scores(features)
        probabilities, distances = self.probabilities(scores), self.distances(features)
        best = scores.argmax(1)
        return [
            Judgement(
                self.labels[int(best[row])],
                float(probabilities[row, best[row]]),
                {label: float(value) for label, value in zip(self.labels, probabilities[row], strict=True)},
                float(distances[row]),
                self._verdict(float(probabilities[row, best[row]]), float(distances[row]), gate),
            )
            for row in range(len(features))
        ]

    def distance_threshold(self, gate: GateMode) -> float:
        """The line of the distance that a mode draws."""
        if gate == "off":
            return float("inf")
        return self.gate.strict_threshold if gate == "strict" else self.gate.threshold

    def _verdict(self, confidence: float, distance: float, gate: GateMode) -> Verdict:
        if distance > self.distance_threshold(gate):
            return "out_of_domain"
        return "routed" if gate == "off" or confidence >= self.confidence_threshold else "low_confidence"

    def tensors(self) -> dict[str, torch.Tensor]:
        """What router.safetensors holds of it; the gate, most of the bytes, in 16 bit."""
        return {
            "scaling.mean": self.scaling.mean,
            "scaling.scale": self.scaling.scale,
            "head.weight": self.head.weight,
            "head.bias": self.head.bias,
        } | self.gate.tensors()

    def numbers(self) -> dict[str, float]:
        """What router.json holds of it."""
        return {
            "temperature": self.temperature,
            "confidence_threshold": self.confidence_threshold,
        } | self.gate.numbers()

    @classmethod
    def from_parts(
        cls, labels: tuple[str, ...], tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]
    ) -> RouterModel:
        return cls(
            labels,
            Scaling(tensors["scaling.mean"], tensors["scaling.scale"]),
            Head(tensors["head.weight"], tensors["head.bias"]),
            _gate_class(tensors).from_parts(tensors, numbers),
            numbers["temperature"],
            numbers["confidence_threshold"],
        )


def expected_shapes(labels: int, size: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of a router of so many labels and feature dimensions must have."""
    return {
        "scaling.mean": (size,),
        "scaling.scale": (size,),
        "head.weight": (labels, size),
        "head.bias": (labels,),
    } | _gate_class(tensors).shapes(labels, size, tensors)


def _gate_class(tensors: Mapping[str, torch.Tensor]) -> type[Gate]:
    """The kind of the gate that a router's tensors are of."""
    if "gate.centres" in tensors:
        return DistanceGate
    return NullClassGate if "gate.null_weight" in tensors else NeighbourGate
