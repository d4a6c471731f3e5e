"""What a tensor's delta costs at each of many settings, measured on some of its rows before any is chosen."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from meswitch_cli.delta.codes import CodeName, TrellisCode
from meswitch_cli.delta.low_rank import leading_directions
from meswitch_cli.delta.rounding import Rounder
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import Sensitivity
from meswitch_cli.delta.steps import FIT_ROUNDS, column_energy
from meswitch_cli.delta.sweep import RowBlocks

#: Rows that are measured of a tensor, at least if it has as many: every so many, evenly spread.
MEASURED_ROWS = 128
#: Elements that are measured at once.
BLOCK_ELEMENTS = 1 << 20
#: Of a direction's two vectors in 4 bits, over their energy: what 16 levels leave of a Gaussian, unbiased.
FACTOR_NOISE = 2 * 0.0117


@dataclass(frozen=True)
class Options:
    """Settings of a tensor that are weighed against each other: all combinations.

    Attributes:
        codes: (bits, code) pairs.
        ranks, salient: ascending.
    """

    codes: tuple[tuple[float, CodeName], ...]
    ranks: tuple[int, ...] = (0,)
    salient: tuple[int, ...] = (0,)

    def within(self, shape: tuple[int, ...]) -> Options:
        """Those that a tensor of this shape can have."""
        return replace(
            self,
            ranks=tuple(rank for rank in self.ranks if 2 * rank <= min(shape)),
            salient=tuple(count for count in self.salient if 2 * count <= shape[1]),
        )

    def settings(self, template: QuantizerSettings) -> list[QuantizerSettings]:
        """In the order of `trade_off`'s costs."""
        return [
            replace(template, bits=bits, code=code, rank=rank, salient=salient)
            for rank in self.ranks
            for bits, code in self.codes
            for salient in self.salient
        ]


def trade_off(
    base: torch.Tensor,
    expert: torch.Tensor,
    options: Options,
    template: QuantizerSettings,
    sensitivity: Sensitivity,
    device: torch.device | str = "cpu",
    *,
    every_row: bool = False,
) -> list[float] | None:
    """What `quantize` would cost with each of `options.settings(template)`, nats of KL a token; None where base and
    expert `[out, in]` are equal.

    The codes' errors are those of some rows, or of all, for unbiased steps, weighted by the sensitivity and scaled up
    by the rows' weights. Salient channels cost nothing, and the others less: a trellis code, whose search takes long,
    is fitted beside no salient channels and beside some, and its noise is in proportion to the row's energy between.
    Fitting the factors last takes `rank / out` of the codes' noise off, since as many of its directions are made good;
    the factors' own rounding is added.

    Raises:
        FloatingPointError: a weight is NaN or infinite.
    """
    whole = RowBlocks(base, expert, device)
    columns, most = whole.shape[1], max(options.ranks)
    left, right = torch.empty(whole.shape[0], 0, device=device), torch.empty(0, columns, device=device)
    if most:
        left, right, energy = leading_directions(whole.tall, whole.shape, most, device)
    else:
        energy = whole.column_sum(column_energy)
    if not torch.isfinite(energy).all():
        raise FloatingPointError("NaN or infinity")
    if not float(energy.sum()):
        return None
    nothing = torch.empty(0, dtype=torch.long, device=device)
    rounders = [
        Rounder(
            settings=replace(template, bits=bits, code=code, rank=0, salient=0, channel_scale="none"),
            scale=None,
            salient=nothing,
        )
        for bits, code in options.codes
    ]

    stride = 1 if every_row else max(1, whole.shape[0] // MEASURED_ROWS)
    some = RowBlocks(base[::stride], expert[::stride], device)

    def strided(place: slice) -> slice:
        """Where a block's rows lie in the tensor; a longer vocabulary's further rows are not compressed."""
        return slice(place.start * stride, min(place.stop * stride, whole.shape[0]), stride)

    def rests(block: torch.Tensor, place: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rank by rank what the directions leave of a block, and what they are of it."""
        directions, taken = torch.zeros_like(block), 0
        for rank in options.ranks:
            step = left[strided(place), taken:rank] @ right[taken:rank]
            directions += step
            block -= step
            taken = rank
            yield block, directions

    def energies(block: torch.Tensor, place: slice) -> torch.Tensor:
        return torch.stack([column_energy(rest) for rest, _ in rests(block, place)]).double()

    def noise(rounder: Rounder, rest: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What a code's errors in the channels that are not salient cost, `[rows, salient]`."""
        searched = isinstance(rounder.settings.coding, TrellisCode)
        fitted = (0, options.salient[len(options.salient) // 2]) if searched else options.salient
        energy, found = _beyond(rest.square(), order, options.salient), []
        for place, count in enumerate(options.salient):
            if count in fitted:
                own = replace(rounder, salient=order[:count])
                fit = own.fit(rest, FIT_ROUNDS)
                errors = (rest - own.values(fit.multiples, fit.unbiased)).square_() * weights
                of_fitted = energy[:, place]
            share = torch.nan_to_num(energy[:, place] / of_fitted)
            found.append(_beyond(errors, order, [count])[:, 0] * share)
        return torch.stack(found, 1)

    def measure(block: torch.Tensor, place: slice) -> torch.Tensor:
        """Costs `[ranks, codes, salient]` of a block's rows."""
        weights = sensitivity.of_rows(strided(place))
        found = []
        for rank, order, (rest, directions) in zip(options.ranks, orders, rests(block, place), strict=True):
            of_factors = FACTOR_NOISE * _beyond(weights * directions.square(), order, options.salient)
            for rounder in rounders:
                of_code = noise(rounder, rest, order, weights) * (1 - rank / whole.shape[0])
                found.append((of_code + of_factors).sum(0, dtype=torch.float64))
        return torch.stack(found)

    own = functools.reduce(torch.add, some.sweep(energies, BLOCK_ELEMENTS))
    own = own if sensitivity.input_energy is None else own * sensitivity.input_energy
    orders = own.topk(max(options.salient)).indices
    costs = functools.reduce(torch.add, some.sweep(measure, BLOCK_ELEMENTS))
    if stride > 1:
        row_weights = sensitivity.row_weights().double()
        measured = float(row_weights[::stride].sum())
        costs *= float(row_weights.sum()) / measured if measured else stride
    return [float(cost) for cost in costs.flatten()]


def _beyond(values: torch.Tensor, order: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Sums of rows `[rows, in]` without their first channels by an order, for each of some counts: `[rows, counts]`."""
    total = values.sum(1, keepdim=True)
    first = torch.cat([torch.zeros_like(total), values[:, order].cumsum(1)], 1)
    return (total - first[:, list(counts)]).clamp_(min=0)
