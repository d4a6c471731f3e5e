"""What a tensor's delta costs at each of many settings, measured on some of its rows before any is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from meswitch_cli.delta.codes import CodeName, TrellisCode
from meswitch_cli.delta.low_rank import leading_directions
from meswitch_cli.delta.rounding import Rounder
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import Sensitivity
from meswitch_cli.delta.steps import FIT_ROUNDS, column_energy, step_ratio
from meswitch_cli.delta.sweep import RowBlocks

#: Rows that are measured of a tensor, at least if it has as many: every so many, evenly spread.
MEASURED_ROWS = 128
#: Elements that are measured at once.
BLOCK_ELEMENTS = 1 << 20
#: What rounding a direction's two vectors leaves of their energy, by bits. At 4: what 16 levels leave of a Gaussian,
#: unbiased; at 8: of an embedding's, whose rows are of very different sizes.
FACTOR_NOISE = {4: 2 * 0.0117, 8: 0.001, 16: 0.0}


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
    worth_measuring: Callable[[list[float]], list[bool]] | None = None,
    every_row: bool = False,
) -> list[float] | None:
    """What `quantize` would cost with each of `options.settings(template)`, nats of KL a token; None where base and
    expert `[out, in]` are equal.

    `worth_measuring` is told what each costs or, before that is measured, would cost if a code's errors were to those
    of plain signs what they are at one rank; of those that it never wants, the cost is infinite, unless it comes with
    another's.

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
        left, right, energy = leading_directions(whole.tall, whole.shape, most, device, template.factor_bits)
    else:
        energy = whole.column_sum(column_energy)
    if not torch.isfinite(energy).all():
        raise FloatingPointError("NaN or infinity")
    if not float(energy.sum()):
        return None
    stride = 1 if every_row else max(1, whole.shape[0] // MEASURED_ROWS)
    rows = _MeasuredRows(
        options, template, sensitivity, RowBlocks(base[::stride], expert[::stride], device), stride, left, right
    )
    if worth_measuring is None:
        costs = rows.costs(rows.asked)
    else:
        costs = _worth(rows, worth_measuring)
    if stride > 1:
        row_weights = sensitivity.row_weights().double()
        measured = float(row_weights[::stride].sum())
        costs *= float(row_weights.sum()) / measured if measured else stride
    return [float(cost) for cost in costs.flatten()]


def _worth(rows: _MeasuredRows, worth_measuring: Callable[[list[float]], list[bool]]) -> torch.Tensor:
    """Costs `[ranks, codes, salient]` of settings that are worth measuring, infinity for the others."""
    known, rank, middle = torch.zeros_like(rows.asked), len(rows.options.ranks) // 2, rows.middle
    known[rank, :, [0, middle]] = True
    costs = rows.costs(known)
    signs, rounding = rows.of_signs()
    over_signs = torch.nan_to_num((costs[rank] - rounding[rank]) / signs[rank])
    for place in range(known.shape[2]):
        over_signs[:, place] = over_signs[:, middle if place >= middle else 0]
    reckoned = over_signs * signs[:, None] + rounding[:, None]
    while True:
        unknown = costs.isinf()
        told = torch.where(unknown, reckoned, costs).flatten().tolist()
        wanted = torch.tensor(worth_measuring(told)).view(known.shape) & unknown.cpu()
        if not wanted.any():
            return costs
        costs = torch.minimum(costs, rows.costs(wanted))


class _MeasuredRows:
    """The rows of a tensor that are measured, with the directions `[out, rank]`, `[rank, in]` of the whole."""

    def __init__(
        self,
        options: Options,
        template: QuantizerSettings,
        sensitivity: Sensitivity,
        blocks: RowBlocks,
        stride: int,
        left: torch.Tensor,
        right: torch.Tensor,
    ) -> None:
        self.options, self._sensitivity, self._blocks, self._stride = options, sensitivity, blocks, stride
        self._left, self._right, self._out = left, right, left.shape[0]
        self._factor_noise = FACTOR_NOISE[template.factor_bits]
        nothing = torch.empty(0, dtype=torch.long, device=left.device)
        self._rounders = [
            Rounder(
                settings=replace(template, bits=bits, code=code, rank=0, salient=0, channel_scale="none"),
                scale=None,
                salient=nothing,
            )
            for bits, code in options.codes
        ]
        #: The place of the count of salient channels from which on a trellis code is fitted beside so many.
        self.middle = len(options.salient) // 2
        #: All settings, `[ranks, codes, salient]`.
        self.asked = torch.ones(len(options.ranks), len(options.codes), len(options.salient), dtype=torch.bool)
        energy = self._sum(
            lambda block, place: torch.stack([column_energy(rest) for rest, _ in self._rests(block, place)])
        )
        energy = energy if sensitivity.input_energy is None else energy * sensitivity.input_energy
        #: By rank, the channels whose rests cost most.
        self._orders = energy.topk(max(options.salient)).indices

    def _sum(self, of_block: Callable[[torch.Tensor, slice], torch.Tensor]) -> torch.Tensor:
        return functools.reduce(torch.add, self._blocks.sweep(lambda *block: of_block(*block).double(), BLOCK_ELEMENTS))

    def _strided(self, place: slice) -> slice:
        """Where a block's rows lie in the tensor; a longer vocabulary's further rows are not compressed."""
        return slice(place.start * self._stride, min(place.stop * self._stride, self._out), self._stride)

    def _rests(self, block: torch.Tensor, place: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rank by rank what the directions leave of a block, and what they are of it."""
        directions, taken = torch.zeros_like(block), 0
        for rank in self.options.ranks:
            step = self._left[self._strided(place), taken:rank] @ self._right[taken:rank]
            directions += step
            block -= step
            taken = rank
            yield block, directions

    def costs(self, asked: torch.Tensor) -> torch.Tensor:
        """Costs `[ranks, codes, salient]` of settings that are asked for, bool, infinity for others."""

        def measure(block: torch.Tensor, place: slice) -> torch.Tensor:
            weights, found = self._sensitivity.of_rows(self._strided(place)), []
            for rank, order, own, (rest, directions) in zip(
                self.options.ranks, self._orders, asked.tolist(), self._rests(block, place), strict=True
            ):
                costs = torch.full(asked.shape[1:], torch.inf, dtype=torch.float64, device=block.device)
                if any(map(any, own)):
                    of_factors = self._of_factors(directions, order, weights)
                    energy = _beyond(rest.square(), order, self.options.salient)
                    for index, (rounder, counts) in enumerate(zip(self._rounders, own, strict=True)):
                        for count, noise in self._noise(rounder, rest, order, weights, energy, counts):
                            of_code = noise * (1 - rank / self._out)
                            costs[index, count] = (of_code + of_factors[:, count]).sum(0, dtype=torch.float64)
                found.append(costs)
            return torch.stack(found)

        return self._sum(measure)

    def _noise(
        self,
        rounder: Rounder,
        rest: torch.Tensor,
        order: torch.Tensor,
        weights: torch.Tensor,
        energy: torch.Tensor,
        asked: list[bool],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """What a code's errors in the channels that are not salient cost, `[rows]`, by the place of their count.

        Those that are asked for and, of a trellis code, those for which the same search does.
        """
        places = range(len(asked))
        parts = [[place] for place in places]
        if isinstance(rounder.settings.coding, TrellisCode):
            parts = [list(places[: self.middle]), list(places[self.middle :])]
        for part in parts:
            if not any(asked[place] for place in part):
                continue
            salient = order[: self.options.salient[part[0]]]
            own = replace(rounder, salient=salient)
            fit = own.fit(rest, FIT_ROUNDS)
            errors = (rest - own.values(fit.multiples, fit.unbiased)).square_() * weights
            for place in part:
                share = torch.nan_to_num(energy[:, place] / energy[:, part[0]])
                yield place, _beyond(errors, order, [self.options.salient[place]])[:, 0] * share

    def _of_factors(self, directions: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._factor_noise * _beyond(weights * directions.square(), order, self.options.salient)

    def of_signs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[ranks, salient]`: what signs with unbiased steps would cost, and what the factors' rounding does."""

        def of_block(block: torch.Tensor, place: slice) -> torch.Tensor:
            weights, found = self._sensitivity.of_rows(self._strided(place)), []
            for rank, order, (rest, directions) in zip(
                self.options.ranks, self._orders, self._rests(block, place), strict=True
            ):
                size, square = rest.abs(), rest.square()
                energy, length, squares, products, plain = (
                    _beyond(item, order, self.options.salient)
                    for item in (square, size, weights * square, weights * size, weights)
                )
                step = step_ratio(energy, length)
                # Sums of weights * (size - step)^2.
                of_code = (squares - 2 * step * products + step.square() * plain) * (1 - rank / self._out)
                both = torch.stack([of_code, self._of_factors(directions, order, weights)])
                found.append(both.sum(1, dtype=torch.float64))
            return torch.stack(found)

        signs, rounding = self._sum(of_block).unbind(1)
        return signs, rounding


def _beyond(values: torch.Tensor, order: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Sums of rows `[rows, in]` without their first channels by an order, for each of some counts: `[rows, counts]`."""
    total = values.sum(1, keepdim=True)
    first = torch.cat([torch.zeros_like(total), values[:, order].cumsum(1)], 1)
    return (total - first[:, list(counts)]).clamp_(min=0)
