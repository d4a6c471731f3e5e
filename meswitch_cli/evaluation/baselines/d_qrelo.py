"""D-QRELO: one sign mask with one scale, and singular directions of what it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.baselines.calibrated import CalibratedRounding, Feedback, Grid, rounded
from meswitch_cli.evaluation.baselines.low_rank import rank_at, truncated
from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, packed_bytes


@dataclass(frozen=True, kw_only=True)
class DQRelo(Method):
    """`d-qrelo`: signs times one scale, and a low rank in 16 bit, together `bits` bits a weight (arXiv 2604.16940).

    2 bits are the authors' 1/8 of the size. `order=signs-first` codes the delta and takes the directions of what is
    left, which the authors found better; `svd-first` codes what the delta's own directions leave. `rank` 0: as many
    directions as the budget has room for beside the signs, at least one.

    The authors use no data. `rounding=gptq` chooses the signs with error feedback on the calibration file, so that the
    method is not behind others for want of it.
    """

    bits: float = 2.0
    rank: int = 0
    order: Literal["signs-first", "svd-first"] = "signs-first"
    rounding: CalibratedRounding = "nearest"

    @property
    def needs_calibration(self) -> bool:
        return self.rounding == "gptq"

    def statistics(self, activations: Activations) -> Mapping[str, InputStatistics]:
        return activations.statistics("file", gram=True) if self.rounding == "gptq" else {}

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        rank = min(self.rank or rank_at(delta.shape, self.bits - 1), *delta.shape)
        gram = None if statistics is None or self.rounding == "nearest" else statistics.gram
        feedback = None if gram is None else Feedback.of(gram)
        if self.order == "signs-first":
            coded = one_bit(delta, feedback)
            directions = truncated(delta - coded, rank)
        else:
            directions = truncated(delta, rank)
            coded = one_bit(delta - directions.delta, feedback)
        return Approximation(coded + directions.delta, packed_bytes(delta.shape, 1) + 2 + directions.nbytes)


def one_bit(delta: torch.Tensor, feedback: Feedback | None) -> torch.Tensor:
    """The sign of each entry times the mean magnitude, 0 counting as negative; with feedback, what stands in an entry's
    place once other entries' errors have been passed on decides its sign."""
    scale = delta.abs().mean().clamp(min=1e-12).expand_as(delta)
    return rounded(delta, Grid(2 * scale, 2 * scale, torch.full_like(delta, 0.5), 1), feedback)
