"""Two gates a prompt passes before it reaches an expert: how sure the router is, and how near its training prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from meswitch_cli.errors import RouterError

#: Directions in which prompts of one domain differ most and whose variance is kept; beyond them one variance is
#: shared. The gate is most of a router's bytes, and they grow with this.
MAX_DIRECTIONS = 64
#: Of held-in prompts the distance gate lets through at least this share, and at most the next one.
LEAST_KEPT, MOST_KEPT = 0.95, 0.99
#: Below one half a calibrated confidence says that the expert is more likely wrong than right.
LOWEST_CONFIDENCE = 0.5
#: A precision is not read off fewer prompts than this, or off fewer than half where there are not twice as many.
LEAST_ROUTED = 10


@dataclass(frozen=True)
class DistanceGate:
    """Mahalanobis distance to the nearest domain's centre (Lee et al., arXiv 1807.03888).

    The covariance is shared by the domains and low-rank plus a constant (probabilistic principal components, Tipping
    and Bishop 1999): a full one would take megabytes, and hundreds of prompts could not estimate it.

    Attributes:
        centres: `[labels, d]`; directions: `[d, r]` orthonormal; variances: `[r]` along them.
        residual: variance in each of the other d - r directions.
        threshold: of the mean squared distance a dimension; above it a prompt is out of domain.
    """

    centres: torch.Tensor
    directions: torch.Tensor
    variances: torch.Tensor
    residual: float
    threshold: float = float("inf")

    @property
    def strict_threshold(self) -> float:
        """The same: nothing was known of other fields when it was drawn."""
        return self.threshold

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """`[n, d]` scaled features to `[n]` squared distances, divided by d."""
        offsets = features[:, None, :] - self.centres
        along = offsets @ self.directions
        within = (along.square() / self.variances).sum(-1)
        beyond = (offsets.square().sum(-1) - along.square().sum(-1)).clamp_min(0) / self.residual
        return (within + beyond).amin(1) / features.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "gate.centres": self.centres,
            "gate.directions": self.directions.half(),
            "gate.variances": self.variances,
        }

    def numbers(self) -> dict[str, float]:
        return {"distance_threshold": self.threshold, "distance_residual": self.residual}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> DistanceGate:
        return cls(
            tensors["gate.centres"],
            tensors["gate.directions"].float(),
            tensors["gate.variances"],
            numbers["distance_residual"],
            numbers["distance_threshold"],
        )

    @staticmethod
    def shapes(labels: int, size: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        """Of the tensors; the number of directions is free.

        Raises:
            RouterError: they are none, or more than there can be.
        """
        rank = len(tensors.get("gate.variances", ()))
        if not 1 <= rank <= MAX_DIRECTIONS:
            raise RouterError(f"the gate has {rank} directions, 1 to {MAX_DIRECTIONS} are possible")
        return {"gate.centres": (labels, size), "gate.directions": (size, rank), "gate.variances": (rank,)}


def fit_distances(features: torch.Tensor, labels: torch.Tensor, classes: int, seed: int) -> DistanceGate:
    """Fit on scaled training features `[n, d]` and their label indices `[n]`."""
    centres = torch.stack([features[labels == label].mean(0) for label in range(classes)])
    centred = features - centres[labels]
    freedom = max(1, len(features) - classes)
    rank = min(MAX_DIRECTIONS, freedom - 1, features.shape[1] - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, singular, directions = torch.svd_lowrank(centred, q=min(rank + 8, *centred.shape), niter=4)
    variances = singular[:rank].square() / freedom
    total = centred.square().sum() / freedom
    residual = float((total - variances.sum()).clamp_min(0) / (features.shape[1] - rank))
    floor = 1e-6 * float(total) / features.shape[1] + 1e-12
    # In 16 bit, as they are stored: a router that was saved and loaded decides as it did before.
    stored = directions[:, :rank].half().float()
    return DistanceGate(centres, stored, variances.clamp_min(floor), max(residual, floor))


def distance_threshold(held_in: torch.Tensor, null: torch.Tensor | None) -> float:
    """Where to draw the line, from distances of held-in prompts and, where given, of prompts of no domain.

    Between the quantiles `LEAST_KEPT` and `MOST_KEPT` of the held-in distances; with null prompts, where most of
    them are refused for the fewest held-in ones (Youden's index).
    """
    ordered = held_in.sort().values
    low, high = (float(torch.quantile(ordered, share)) for share in (LEAST_KEPT, MOST_KEPT))
    if null is None or not len(null):
        return high
    candidates = torch.unique(torch.cat([ordered, null, torch.tensor([low, high])]))
    candidates = candidates[(candidates >= low) & (candidates <= high)]
    index = [float((ordered <= line).float().mean() - (null <= line).float().mean()) for line in candidates]
    return float(candidates[max(range(len(index)), key=lambda item: (index[item], item))])


@dataclass(frozen=True)
class RiskPoint:
    """At this confidence or more: the share of prompts that are routed, and how many of those rightly."""

    confidence: float
    coverage: float
    precision: float


def risk_coverage(confidence: Sequence[float], correct: Sequence[bool]) -> list[RiskPoint]:
    """One point for every confidence that occurs, surest first (Geifman and El-Yaniv, arXiv 1705.08500)."""
    ordered = sorted(zip(confidence, correct, strict=True), reverse=True)
    points: list[RiskPoint] = []
    right = 0
    for count, (value, is_right) in enumerate(ordered, 1):
        right += is_right
        if count == len(ordered) or ordered[count][0] < value:
            points.append(RiskPoint(value, count / len(ordered), right / count))
    return points


def confidence_threshold(confidence: Sequence[float], correct: Sequence[bool], target_precision: float) -> float:
    """The lowest confidence at which those routed are right often enough, and never below one half.

    Raises:
        RouterError: there is none.
    """
    least = min(LEAST_ROUTED / max(1, len(confidence)), 0.5)
    points = [
        point
        for point in risk_coverage(confidence, correct)
        if point.confidence >= LOWEST_CONFIDENCE and point.coverage >= least
    ]
    enough = [point for point in points if point.precision >= target_precision]
    if not enough:
        best = max(points, key=lambda point: (point.precision, point.coverage), default=None)
        found = f"the best is {best.precision:.3f} for {best.coverage:.0%} of them" if best else "none is even likely"
        raise RouterError(
            f"no threshold reaches a precision of {target_precision} on {len(confidence)} calibration prompts; "
            f"{found}. Give more or cleaner data, or a lower --target-precision"
        )
    lowest = enough[-1]
    # Every prompt down to one half may pass where all of them together are right often enough.
    return LOWEST_CONFIDENCE if lowest is points[-1] else lowest.confidence
