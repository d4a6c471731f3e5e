"""Delta-CoMe: singular directions in mixed precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.baselines.calibrated import CalibratedRounding, Feedback, rounded
from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method
from meswitch_cli.evaluation.baselines.rtn import asymmetric_grid, grid_bytes

#: Singular vectors that Delta-CoMe keeps at 8 and at 3 bits; the rest have 2 (its published run at 1/16 of the size).
COME_VECTORS = {8: 2, 3: 32}
COME_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class DeltaCome(Method):
    """`delta-come`: singular vectors at 8, 3 and 2 bits by their value (arXiv 2406.08903, section 3), to a budget.

    The two first at 8 bits, 32 at 3, as many as the budget of `bits` bits a weight allows at 2, in groups of 128 along
    a vector: of a 4096 x 4096 matrix at 1 bit the authors' 2, 32 and 968. The budget counts codes alone, as theirs
    does; scales and zero points are in the bytes.

    `rounding=gptq` rounds as the authors do, on the calibration file: the right vectors by the layer's inputs x, the
    left ones by what the rounded right ones make of x. Theirs takes the inputs of each layer from the layers already
    rounded; here they are the full expert's.
    """

    bits: float = 1.0
    rounding: CalibratedRounding = "nearest"

    @property
    def needs_calibration(self) -> bool:
        return self.rounding == "gptq"

    def statistics(self, activations: Activations) -> Mapping[str, InputStatistics]:
        return activations.statistics("file", gram=True) if self.rounding == "gptq" else {}

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        gram = None if statistics is None or self.rounding == "nearest" else statistics.gram
        of_inputs = None if gram is None else Feedback.of(gram)
        total, nbytes, start = torch.zeros_like(delta), 0, 0
        for bits, count in come_ranks(delta.shape, self.bits).items():
            stop = min(start + count, len(values))
            if stop == start:
                continue
            root = values[start:stop].sqrt()
            across, down = root[:, None] * right[start:stop], left[:, start:stop] * root
            rows = rounded(across, asymmetric_grid(across, bits, COME_GROUP), of_inputs)
            of_rows = None if gram is None else Feedback.of(rows @ gram @ rows.T)
            columns = rounded(down, asymmetric_grid(down.T, bits, COME_GROUP).transposed(), of_rows)
            total += columns @ rows
            nbytes += sum(grid_bytes(part.shape, bits, COME_GROUP) for part in (across, down.T))
            start = stop
        return Approximation(total, nbytes)


def come_ranks(shape: torch.Size, bits: float) -> dict[int, int]:
    """Vectors by code width, whose codes take `bits` bits a weight of `[out, in]`."""
    budget = bits * shape[0] * shape[1] / (shape[0] + shape[1])
    ranks = {}
    for precision, count in COME_VECTORS.items():
        ranks[precision] = min(count, int(budget / precision))
        budget -= precision * ranks[precision]
    return ranks | {2: int(budget / 2)}
