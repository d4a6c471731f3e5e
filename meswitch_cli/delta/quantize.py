"""From a base and an expert weight to a low-bit delta with salient channels, and back.

Rows are independent, so everything runs on blocks of rows that stay in the processor's cache; only column sums
(channel scales, reconstruction errors) span blocks, each in a sweep of its own before the one that quantises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from meswitch_cli.delta.codes import (
    FIT_ROUNDS,
    codes_of,
    column_energy,
    dots,
    grouped,
    initial_steps,
    multiples_of,
    nearest_multiples,
    per_channel,
    step_ratio,
)
from meswitch_cli.delta.feedback import feedback_multiples, inverse_factor
from meswitch_cli.delta.low_rank import Directions, LowRank, fit_factors, leading_directions
from meswitch_cli.delta.packing import pack, unpack
from meswitch_cli.delta.parallel import in_order
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics

#: Elements a block holds: a handful of fp32 temporaries of this size stay in a few MiB of cache.
BLOCK_ELEMENTS = 1 << 18
#: The same for error feedback, which goes column by column: few tall blocks, so that a column is worth a call.
FEEDBACK_BLOCK_ELEMENTS = 1 << 22
#: The same for products with a low-rank part's vectors: their sums over rows are as wide as the tensor, block by block.
FACTOR_BLOCK_ELEMENTS = 1 << 20
#: Blocks of a tensor that decide how much its outputs' projection is off: one number does not need all of them.
OUTPUT_BLOCKS = 16
_Result = TypeVar("_Result")
_FP16_MAX = 65504.0
_FP16_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True)
class QuantizedDelta:
    """A compressed delta `[out, in]`.

    Attributes:
        bits: code width.
        in_features: input channels (the codes' words may hold padding).
        group_size: input channels that share a step; 0 is one step per output channel.
        codes: `[out, ceil(in * bits / 32)]` int32.
        steps: `[out, groups]` fp32 (fp16 where groups are used and the values allow it).
        salient_index: `[k]` int32, ascending.
        salient_value: `[out, k]` fp16, what to add to the rest in those channels.
        channel_scale: `[in]` fp16, or None for all ones.
        low_rank: what is added to the codes' values everywhere, or None.
    """

    bits: int
    in_features: int
    group_size: int
    codes: torch.Tensor
    steps: torch.Tensor
    salient_index: torch.Tensor
    salient_value: torch.Tensor
    channel_scale: torch.Tensor | None
    low_rank: LowRank | None = None


@dataclass(frozen=True)
class DeltaError:
    """How far a compressed delta is from the delta, all sums over the tensor.

    Attributes:
        delta_energy: squared Frobenius norm of the delta.
        weight_error: squared Frobenius norm of the error, over `delta_energy`.
        output_error: the same with each input channel weighted by its energy; None without calibration.
    """

    delta_energy: float
    weight_error: float
    output_error: float | None


def quantize(
    base: torch.Tensor,
    expert: torch.Tensor,
    settings: QuantizerSettings,
    statistics: InputStatistics | None = None,
    device: torch.device | str = "cpu",
) -> tuple[QuantizedDelta, DeltaError] | None:
    """Compress `expert - base`, both `[out, in]` of any floating dtype; None where the two are equal.

    Salient channels are the k with the largest E_i = a_i * sum_o (d_oi - d_hat_oi)^2, a_i the input's energy (1
    without calibration); steps are fitted on the other channels (ME-Switch, arXiv 2406.09041, section 4.1). With a
    low-rank part all this is done on the delta without its leading directions, see `low_rank`.

    Raises:
        ValueError: settings that need calibration without statistics, or more salient channels than inputs.
        FloatingPointError: a weight is NaN or infinite.
    """
    columns = expert.shape[1]
    if settings.salient > columns:
        raise ValueError(f"{settings.salient} salient channels asked for, the tensor has {columns} input channels")
    gram = None if statistics is None or statistics.gram is None else statistics.gram.to(device)
    if settings.needs_gram and gram is None:
        raise ValueError(f"rounding={settings.rounding!r}, steps={settings.steps!r} need calibration data")
    work = _Work(base, expert, settings, device, statistics)
    salient = work.select_salient(settings.salient)
    quantized = work.run(salient, gram)
    return (quantized, work.error()) if work.delta_energy else None


def dequantize(delta: QuantizedDelta) -> torch.Tensor:
    """The delta that a `QuantizedDelta` stands for, fp32 `[out, in]`."""
    values = multiples_of(unpack(delta.codes, delta.bits, delta.in_features), delta.bits)
    values *= per_channel(delta.steps.float(), delta.in_features, delta.group_size)
    if delta.channel_scale is not None:
        values *= delta.channel_scale.float()
    if delta.low_rank is not None:
        values += delta.low_rank.left() @ delta.low_rank.right()
    if delta.salient_index.numel():
        values[:, delta.salient_index.long()] += delta.salient_value.float()
    return values


class _Fit(NamedTuple):
    """Multiples `[rows, in]` of a block and two kinds of steps for them, `[rows, groups]`."""

    multiples: torch.Tensor
    least_squares: torch.Tensor
    unbiased: torch.Tensor


class _Block(NamedTuple):
    """What quantising a block of rows gives; the energies are sums over its rows, by column.

    With a low-rank part to come there are no salient residuals yet: `rest` is the image `[rows, rank]` of the delta
    without the codes' values, else the residuals `[rows, k]`.
    """

    codes: torch.Tensor
    steps: torch.Tensor
    rest: torch.Tensor
    energy: torch.Tensor
    residual_energy: torch.Tensor


class _Work:
    """The sweeps over one tensor's row blocks."""

    def __init__(
        self,
        base: torch.Tensor,
        expert: torch.Tensor,
        settings: QuantizerSettings,
        device: torch.device | str,
        statistics: InputStatistics | None,
    ) -> None:
        self.base, self.expert, self.settings, self.device = base, expert, settings, device
        self.columns = expert.shape[1]
        self.directions: Directions | None = None
        if settings.rank:
            rank, shape = min(settings.rank, *expert.shape), (expert.shape[0], expert.shape[1])
            tall = partial(self._sweep, elements=FACTOR_BLOCK_ELEMENTS)
            self.directions = leading_directions(tall, shape, rank, device)
        self.scale = self._channel_scale() if settings.channel_scale == "rms" else None
        self.scale32 = None if self.scale is None else self.scale.float()
        self.inverse_scale = None
        if self.scale32 is not None:
            self.inverse_scale = torch.where(self.scale32 > 0, 1 / self.scale32, torch.zeros_like(self.scale32))
        self.inputs = None if statistics is None or statistics.inputs is None else statistics.inputs.to(device)
        if self.inputs is not None and self.scale32 is not None:  # the codes see the delta divided by t
            self.inputs = self.inputs * self.scale32
        self.input_energy = None if statistics is None else statistics.energy.to(device)
        self.energy = torch.zeros(self.columns, dtype=torch.float64, device=device)
        self.residual_energy = torch.zeros(self.columns, dtype=torch.float64, device=device)

    @property
    def delta_energy(self) -> float:
        """Squared Frobenius norm of the delta, once `run` has seen it."""
        return float(self.energy.sum())

    def _channel_scale(self) -> torch.Tensor:
        """RMS of each column over the mean RMS, as fp16: the steps carry the size, so that fp16 has range to spare."""
        energy = torch.zeros(self.columns, dtype=torch.float64, device=self.device)
        for part in self._sweep(lambda block, _: column_energy(block)):
            energy += part
        rms = energy.sqrt()
        return torch.nan_to_num(rms / rms.mean(), nan=0.0).clamp(max=_FP16_MAX).half()

    def _sweep(
        self,
        work: Callable[[torch.Tensor, slice], _Result],
        elements: int = BLOCK_ELEMENTS,
        most: int = 0,
        *,
        whole: bool = False,
    ) -> Iterator[_Result]:
        """Apply a function to what the codes are for, in fp32, block of rows by block of rows; results come in order.

        That is `expert - base` without its leading directions once they are known, or with them: `whole`. The function
        is also given the block's place. `most` blocks, evenly spread, or all of them.
        """
        directions = None if whole else self.directions
        step = max(1, elements // self.columns)
        rows = range(0, self.expert.shape[0], step)
        if most and len(rows) > most:
            rows = rows[:: -(-len(rows) // most)]

        def on_block(row: int) -> _Result:
            place = slice(row, row + step)
            block = self.expert[place].to(device=self.device, dtype=torch.float32, copy=True)
            block.sub_(self.base[place].to(device=self.device, dtype=torch.float32))
            if directions is not None:
                block.addmm_(directions.left[place], directions.right, alpha=-1)
            return work(block, place)

        return in_order(on_block, rows, parallel=torch.device(self.device).type == "cpu")

    def select_salient(self, count: int) -> torch.Tensor:
        """Indices `[count]` of the channels whose reconstruction error costs most, ascending."""
        nothing = torch.empty(0, dtype=torch.long, device=self.device)
        if not count:
            return nothing
        error = torch.zeros(self.columns, dtype=torch.float64, device=self.device)

        def column_error(block: torch.Tensor, _: slice) -> torch.Tensor:
            fit = self._fit(self._scaled(block), nothing, rounds=1)
            return column_energy(block.sub_(self._values(fit.multiples, fit.least_squares)))

        for part in self._sweep(column_error):
            error += part
        if self.input_energy is not None:
            error *= self.input_energy
        return error.topk(count).indices.sort().values

    def run(self, salient: torch.Tensor, gram: torch.Tensor | None) -> QuantizedDelta:
        """Quantise with these salient channels; the energies of delta and error are gathered on the way."""
        settings = self.settings
        factor = None
        if gram is not None:
            if self.scale32 is not None:  # the codes see the delta divided by t, so their inputs are x * t
                gram = gram * self.scale32 * self.scale32[:, None]
            if settings.rounding == "feedback":
                factor = inverse_factor(gram)

        output_factor = self._output_factor(salient, gram, factor) if settings.steps == "output-unbiased" else 1.0

        directions = self.directions
        if directions is not None:
            seen = _without(directions.right, salient)  # salient channels will be exact: no vector need reach for them
            of_directions = directions.right @ seen.T

        def quantise(block: torch.Tensor, place: slice) -> _Block:
            squares = block.square()
            energy = squares.sum(0)
            scaled = self._scaled(block)
            fit = self._rounded(scaled, salient, factor, squares if scaled is block else None)
            steps = self._final_steps(scaled, fit, salient, gram, output_factor)
            packed = pack(codes_of(fit.multiples, settings.bits), settings.bits)
            block -= self._values(fit.multiples, steps)
            if directions is not None:
                image = block @ seen.T + directions.left[place] @ of_directions
                return _Block(packed.cpu(), steps.cpu(), image, energy, energy)
            residual = _sixteen_bit(block[:, salient])
            block[:, salient] -= residual.float()
            return _Block(packed.cpu(), steps.cpu(), residual.cpu(), energy, column_energy(block))

        blocks = list(self._sweep(quantise, BLOCK_ELEMENTS if factor is None else FEEDBACK_BLOCK_ELEMENTS))
        for done in blocks:
            self.energy += done.energy
            self.residual_energy += done.residual_energy
        if not torch.isfinite(self.energy).all():
            raise FloatingPointError("NaN or infinity")
        rest = torch.cat([block.rest for block in blocks])
        if directions is None:
            return self._result(blocks, salient, rest)
        return self._with_low_rank(self._result(blocks, salient, rest[:, :0]), directions, salient, rest)

    def _with_low_rank(
        self, coded: QuantizedDelta, directions: Directions, salient: torch.Tensor, images: torch.Tensor
    ) -> QuantizedDelta:
        """Fit the factors to the delta without the codes' values, then the salient channels to what is left."""

        def without_codes(work: Callable[[torch.Tensor, slice], _Result]) -> Iterator[_Result]:
            def on_block(block: torch.Tensor, place: slice) -> _Result:
                codes = unpack(coded.codes[place].to(self.device), coded.bits, self.columns)
                steps = coded.steps[place].to(self.device).float()
                return work(block.sub_(self._values(multiples_of(codes, coded.bits), steps)), place)

            return self._sweep(on_block, FACTOR_BLOCK_ELEMENTS, whole=True)

        fit = fit_factors(without_codes, images, salient, (self.expert.shape[0], self.columns))
        residual = _sixteen_bit(fit.left_over)
        self.energy, self.residual_energy = directions.energy, fit.energy
        self.residual_energy[salient] = column_energy(fit.left_over - residual.float()).double()
        return replace(coded, salient_value=residual.cpu(), low_rank=fit.factors)

    def error(self) -> DeltaError:
        """How far the result of `run` is from the delta."""
        output = None
        if self.input_energy is not None:
            weights = self.input_energy.double()
            weighted = float((self.energy * weights).sum())
            output = float((self.residual_energy * weights).sum()) / weighted if weighted else 0.0
        return DeltaError(self.delta_energy, float(self.residual_energy.sum()) / self.delta_energy, output)

    def _scaled(self, block: torch.Tensor) -> torch.Tensor:
        return block if self.inverse_scale is None else block * self.inverse_scale

    def _values(self, multiples: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        values = multiples * per_channel(steps, self.columns, self.settings.group_size)
        return values if self.scale32 is None else values.mul_(self.scale32)

    def _rounded(
        self,
        block: torch.Tensor,
        salient: torch.Tensor,
        factor: torch.Tensor | None,
        squares: torch.Tensor | None = None,
    ) -> _Fit:
        """The codes that are kept, by error feedback where there is a factor for it, and steps for them."""
        fit = self._fit(block, salient, FIT_ROUNDS, squares)
        if factor is None:
            return fit
        exact = torch.zeros(self.columns, device=self.device).index_fill_(0, salient, 1.0)
        spread = per_channel(fit.least_squares, self.columns, self.settings.group_size)
        multiples = feedback_multiples(block, spread, self.settings.bits, factor, exact)
        return self._measured(block, multiples, salient, self._row_sums(block.square(), salient))

    def _fit(
        self, block: torch.Tensor, salient: torch.Tensor, rounds: int, squares: torch.Tensor | None = None
    ) -> _Fit:
        """Nearest multiples and their least-squares steps, fitted in turns on the channels that are not salient.

        `squares` are the block's where they are known; they are overwritten.
        """
        bits, group_size = self.settings.bits, self.settings.group_size
        channels = torch.ones(1, self.columns, device=self.device).index_fill_(1, salient, 0.0)
        energy = self._row_sums(block.square() if squares is None else squares, salient)
        steps = initial_steps(energy, bits, grouped(channels, group_size).sum(-1))
        for _ in range(1 if bits == 1 else rounds):  # at 1 bit the multiple is the sign's, whatever the step
            multiples = nearest_multiples(block, per_channel(steps, self.columns, group_size), bits)
            fit = self._measured(block, multiples, salient, energy)
            steps = fit.least_squares
        return fit

    def _measured(
        self, block: torch.Tensor, multiples: torch.Tensor, salient: torch.Tensor, energy: torch.Tensor
    ) -> _Fit:
        own = self._row_sums(multiples.square(), salient)
        projection = self._row_sums(multiples * block, salient)
        return _Fit(multiples, step_ratio(projection, own), step_ratio(energy, projection))

    def _row_sums(self, products: torch.Tensor, salient: torch.Tensor) -> torch.Tensor:
        """Sums `[rows, groups]` over the channels that are not salient; the products are overwritten in the others."""
        if salient.numel():
            products.index_fill_(1, salient, 0.0)
        return grouped(products, self.settings.group_size).sum(-1)

    def _final_steps(
        self, block: torch.Tensor, fit: _Fit, salient: torch.Tensor, gram: torch.Tensor | None, output_factor: float
    ) -> torch.Tensor:
        steps = fit.unbiased if self.settings.steps in ("unbiased", "output-unbiased") else fit.least_squares
        if self.settings.steps == "output-unbiased":
            steps = steps * output_factor
        if self.settings.steps == "layerwise" and gram is not None:
            # One factor a row: groups keep the proportions that least squares gave them.
            rest = _without(block, salient)
            values = fit.multiples * per_channel(steps, self.columns, self.settings.group_size)
            values = _without(values, salient)
            projected = values @ gram
            steps = steps * step_ratio(dots(projected, rest, 0), dots(projected, values, 0))
        if not self.settings.group_size:
            return steps
        # Grouped steps are stored in fp16 where they fit: rounded here, so that residuals are taken after it.
        return steps.half().float() if _fits_half(steps) else steps

    def _output_factor(self, salient: torch.Tensor, gram: torch.Tensor | None, factor: torch.Tensor | None) -> float:
        """What to multiply unbiased steps by so that <D_hat, D> = <D, D> holds for the outputs: summed over all rows,
        in the metric H = sum x x^T, `gram` or by the inputs themselves; 1 where the inputs are unknown.

        One factor for the tensor: a row's own is too uncertain with few tokens (docs/results/compression.md). Of a
        large tensor every so many blocks are asked.
        """
        inputs = self.inputs
        if gram is None and inputs is None:
            return 1.0

        def projections(block: torch.Tensor, _: slice) -> torch.Tensor:
            scaled = self._scaled(block)
            fit = self._rounded(scaled, salient, factor)
            rest = _without(scaled, salient)
            values = _without(
                fit.multiples * per_channel(fit.unbiased, self.columns, self.settings.group_size), salient
            )
            if gram is not None:
                seen = rest @ gram
                return torch.stack([(seen * rest).sum(), (seen * values).sum()]).double()
            assert inputs is not None
            seen = rest @ inputs.T
            return torch.stack([seen.square().sum(), (seen * (values @ inputs.T)).sum()]).double()

        elements = BLOCK_ELEMENTS if factor is None else FEEDBACK_BLOCK_ELEMENTS
        own, kept = torch.stack(list(self._sweep(projections, elements, OUTPUT_BLOCKS))).sum(0).tolist()
        return float(own / kept) if own > 0 and kept > 0 else 1.0

    def _result(self, blocks: list[_Block], salient: torch.Tensor, salient_value: torch.Tensor) -> QuantizedDelta:
        joined = torch.cat([block.steps for block in blocks])
        if self.settings.group_size and torch.equal(joined.half().float(), joined):
            joined = joined.half()
        return QuantizedDelta(
            self.settings.bits,
            self.columns,
            self.settings.group_size,
            torch.cat([block.codes for block in blocks]),
            joined,
            salient.to(dtype=torch.int32, device="cpu"),
            salient_value,
            None if self.scale is None else self.scale.cpu(),
        )


def _without(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The block with columns set to zero: the block itself where there are none."""
    return block.index_fill(1, columns, 0.0) if columns.numel() else block


def _fits_half(steps: torch.Tensor) -> bool:
    positive = steps[steps > 0]
    return positive.numel() == 0 or bool(positive.min() >= _FP16_SMALLEST_NORMAL and positive.max() <= _FP16_MAX)


def _sixteen_bit(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_FP16_MAX, _FP16_MAX).half()
