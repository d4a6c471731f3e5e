"""The known prompts nearest to one: an expert's, or another field's? Routers of format version 2 ask no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meswitch_cli.errors import RouterError

#: Principal directions kept. On other people's prompts 128 tell fields apart as well as all 576 of a small base, 64 do
#: so a little worse (docs/results/router.md).
DIRECTIONS = 128
#: Nearest prompts whose similarities are averaged. One or two did best at every layer tried, five worse.
NEIGHBOURS = 2
#: Stands for "of no expert" among the owners.
NOBODY = -1
#: No direction is taken for weaker than this share of the strongest: what is left of it is rounding.
_WEAKEST = 1e-4


@dataclass(frozen=True)
class NeighbourGate:
    """Cosine similarity to the nearest prompts of the experts beside that to the nearest of other fields.

    Attributes:
        directions: `[d, r]` principal, each divided by the root of its singular value (orthonormal until version 2).
        points: `[n, r]` known prompts along them, of length 1.
        owners: `[n]` index of the expert whose prompt it is, `NOBODY` for one of another field.
        threshold: of the distance; above it a prompt is out of domain.
        strict_threshold: the same for a router that would rather refuse.
    """

    directions: torch.Tensor
    points: torch.Tensor
    owners: torch.Tensor
    threshold: float = 1.0
    strict_threshold: float = 1.0

    def distances(self, features: torch.Tensor) -> torch.Tensor:
        """`[n, d]` scaled features to `[n]` from 0 (an expert's own) to 1 (another field's); 1/2: as near to both."""
        return distances_of(self.similarities(features), self.owners)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "gate.directions": self.directions.half(),
            "gate.points": self.points.half(),
            "gate.owners": self.owners.to(torch.int16),
        }

    def numbers(self) -> dict[str, float]:
        return {"distance_threshold": self.threshold, "strict_distance_threshold": self.strict_threshold}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]) -> NeighbourGate:
        return cls(
            tensors["gate.directions"].float(),
            tensors["gate.points"].float(),
            tensors["gate.owners"].long(),
            numbers["distance_threshold"],
            numbers["strict_distance_threshold"],
        )

    @staticmethod
    def shapes(labels: int, size: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        """Of the tensors; the numbers of directions and of points are free.

        Raises:
            RouterError: there is a number of directions that cannot be, or an owner that the router does not have.
        """
        directions, owners = tensors.get("gate.directions"), tensors.get("gate.owners")
        rank = directions.shape[-1] if directions is not None and directions.ndim else 0
        if not 1 <= rank <= DIRECTIONS:
            raise RouterError(f"the gate has {rank} directions, 1 to {DIRECTIONS} are possible")
        count = owners.numel() if owners is not None else 0
        if owners is not None and (owners.is_floating_point() or owners.is_complex()):
            raise RouterError("the gate's owners are not whole numbers")
        if owners is not None and count and not -1 <= int(owners.min()) <= int(owners.max()) < labels:
            raise RouterError("the gate has a prompt of an expert that the router does not have")
        return {"gate.directions": (size, rank), "gate.points": (count, rank), "gate.owners": (count,)}

    def similarities(self, features: torch.Tensor) -> torch.Tensor:
        """Cosines with every known prompt, `[n, points]`."""
        return along(features, self.directions) @ self.points.T


def distances_of(similarities: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Distances as `NeighbourGate.distances` gives them, from similarities `[n, points]`; -inf leaves a point out."""
    own, other = (_nearest(similarities[:, mask]) for mask in (owners != NOBODY, owners == NOBODY))
    return (2 + other - own) / 4


def _nearest(similarities: torch.Tensor) -> torch.Tensor:
    """Mean of the highest similarities of each row; -1, the least there is, where no point is left."""
    if not similarities.shape[1]:
        return torch.full((len(similarities),), -1.0)
    return similarities.topk(min(NEIGHBOURS, similarities.shape[1]), dim=1).values.clamp_min(-1).mean(1)


def along(features: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Features `[n, d]` along directions `[d, r]`, scaled to length 1."""
    return torch.nn.functional.normalize(features @ directions, dim=1)


def fit_neighbours(features: torch.Tensor, owners: torch.Tensor, seed: int) -> NeighbourGate:
    """Fit on scaled features `[n, d]` of known prompts and their owners `[n]`.

    The strongest directions tell style and length more than fields, so each is divided by the root of its singular
    value: AUROC on other people's prompts 0.96 where it was 0.94; divided by the whole of it they do worse.
    """
    centred = features - features.mean(0)
    rank = max(1, min(DIRECTIONS, *(size - 1 for size in features.shape)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, singular, directions = torch.svd_lowrank(centred, q=min(rank + 8, *centred.shape), niter=4)
    # In 16 bit, as they are stored: a router that was saved and loaded decides as it did before.
    weakest = singular[0].clamp_min(1e-12) * _WEAKEST
    stored = (directions[:, :rank] * (singular[0] / singular[:rank].clamp_min(weakest)).sqrt()).half().float()
    return NeighbourGate(stored, along(features, stored).half().float(), owners)
