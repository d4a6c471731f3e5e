"""DARE: most entries dropped, the rest made larger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, half, packed_bytes


@dataclass(frozen=True, kw_only=True)
class Dare(Method):
    """`dare`: a share `drop` of the entries set to zero, the rest in 16 bit and rescaled (arXiv 2311.03099).

    `choice=random` drops each entry with that probability, as the authors do; its places follow from the seed and take
    no bytes. `magnitude` keeps the largest, whose places take a bit an entry. `rescale=density` divides by 1 − drop;
    `projection` keeps <D', D> = <D, D>, which is milder to the largest entries; `none` leaves them.
    """

    drop: float = 0.9
    choice: Literal["random", "magnitude"] = "random"
    rescale: Literal["density", "projection", "none"] = "density"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop >= 1:
            raise ValueError("drop must be below 1")

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        if self.choice == "random":
            kept = torch.rand(delta.shape, generator=self.generator(name)) >= self.drop
        else:
            count = round((1 - self.drop) * delta.numel())
            kept = torch.zeros(delta.numel(), dtype=torch.bool)
            kept[delta.flatten().abs().topk(count).indices] = True
            kept = kept.view(delta.shape)
        pruned = torch.where(kept, delta, 0.0)
        nbytes = 2 * int(kept.sum()) + (packed_bytes(delta.shape, 1) if self.choice == "magnitude" else 0)
        return Approximation(half(pruned * self._factor(delta, pruned)), nbytes)

    def _factor(self, delta: torch.Tensor, pruned: torch.Tensor) -> float:
        if self.rescale == "density":
            return 1 / (1 - self.drop)
        own = float(pruned.square().sum(dtype=torch.float64))
        if self.rescale == "none" or not own:
            return 1.0
        return float(delta.square().sum(dtype=torch.float64)) / own
