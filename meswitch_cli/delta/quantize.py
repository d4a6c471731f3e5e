"""From a base and an expert weight to a low-bit delta with salient channels, and back.

Rows are independent, so everything runs on blocks of rows that stay in the processor's cache; only column sums
(channel scales, reconstruction errors) span blocks, each in a sweep of its own before the one that quantises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from meswitch_cli.delta.codes import (
    FIT_ROUNDS,
    centred,
    initial_steps,
    layerwise_steps,
    least_squares_steps,
    per_channel,
    round_to_codes,
    unbiased_steps,
)
from meswitch_cli.delta.feedback import feedback_codes, inverse_factor
from meswitch_cli.delta.packing import pack, unpack
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics

#: Elements a block holds: a handful of fp32 temporaries of this size stay in a few MiB of cache.
BLOCK_ELEMENTS = 1 << 18
#: The same for error feedback, which goes column by column: few tall blocks, so that a column is worth a call.
FEEDBACK_BLOCK_ELEMENTS = 1 << 22
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
        salient_value: `[out, k]` fp16, what to add to the code's value in those channels.
        channel_scale: `[in]` fp16, or None for all ones.
    """

    bits: int
    in_features: int
    group_size: int
    codes: torch.Tensor
    steps: torch.Tensor
    salient_index: torch.Tensor
    salient_value: torch.Tensor
    channel_scale: torch.Tensor | None


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
    without calibration); steps are fitted on the other channels (ME-Switch, arXiv 2406.09041, section 4.1).

    Raises:
        ValueError: settings that need calibration without statistics, or more salient channels than inputs.
        FloatingPointError: a weight is NaN or infinite.
    """
    columns = expert.shape[1]
    if settings.salient > columns:
        raise ValueError(f"{settings.salient} salient channels asked for, the tensor has {columns} input channels")
    gram = None
    if settings.needs_gram:
        if statistics is None or statistics.gram is None:
            raise ValueError(f"rounding={settings.rounding!r}, steps={settings.steps!r} need calibration data")
        gram = statistics.gram.to(device)
    work = _Work(base, expert, settings, device, statistics)
    salient = work.select_salient(settings.salient)
    quantized = work.run(salient, gram)
    return (quantized, work.error()) if work.delta_energy else None


def dequantize(delta: QuantizedDelta) -> torch.Tensor:
    """The delta that a `QuantizedDelta` stands for, fp32 `[out, in]`."""
    values = centred(unpack(delta.codes, delta.bits, delta.in_features).float(), delta.bits)
    values *= per_channel(delta.steps.float(), delta.in_features, delta.group_size)
    if delta.channel_scale is not None:
        values *= delta.channel_scale.float()
    if delta.salient_index.numel():
        values[:, delta.salient_index.long()] += delta.salient_value.float()
    return values


def row_blocks(
    base: torch.Tensor, expert: torch.Tensor, device: torch.device | str, elements: int
) -> Iterator[torch.Tensor]:
    """Yield `expert - base` in fp32, in blocks of rows of about so many elements."""
    step = max(1, elements // expert.shape[1])
    for row in range(0, expert.shape[0], step):
        block = expert[row : row + step].to(device=device, dtype=torch.float32, copy=True)
        yield block.sub_(base[row : row + step].to(device=device, dtype=torch.float32))


def _channel_scale(base: torch.Tensor, expert: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """RMS of each column over the mean RMS, as fp16: the steps carry the size, so that fp16 has range to spare."""
    energy = torch.zeros(expert.shape[1], dtype=torch.float64, device=device)
    for block in row_blocks(base, expert, device, BLOCK_ELEMENTS):
        energy += block.square_().sum(0)
    rms = energy.sqrt()
    return torch.nan_to_num(rms / rms.mean(), nan=0.0).clamp(max=_FP16_MAX).half()


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
        self.scale = _channel_scale(base, expert, device) if settings.channel_scale == "rms" else None
        self.scale32 = None if self.scale is None else self.scale.float()
        self.inverse_scale = None
        if self.scale32 is not None:
            self.inverse_scale = torch.where(self.scale32 > 0, 1 / self.scale32, torch.zeros_like(self.scale32))
        self.input_energy = None if statistics is None else statistics.energy.to(device)
        self.energy = torch.zeros(self.columns, dtype=torch.float64, device=device)
        self.residual_energy = torch.zeros(self.columns, dtype=torch.float64, device=device)

    @property
    def delta_energy(self) -> float:
        """Squared Frobenius norm of the delta, once `run` has seen it."""
        return float(self.energy.sum())

    def select_salient(self, count: int) -> torch.Tensor:
        """Indices `[count]` of the channels whose reconstruction error costs most, ascending."""
        nothing = torch.empty(0, dtype=torch.long, device=self.device)
        if not count:
            return nothing
        error = torch.zeros(self.columns, dtype=torch.float64, device=self.device)
        for block in row_blocks(self.base, self.expert, self.device, BLOCK_ELEMENTS):
            codes, steps = self._nearest(self._scaled(block), nothing)
            error += block.sub_(self._values(codes, steps)).square_().sum(0)
        if self.input_energy is not None:
            error *= self.input_energy
        return error.topk(count).indices.sort().values

    def run(self, salient: torch.Tensor, gram: torch.Tensor | None) -> QuantizedDelta:
        """Quantise with these salient channels; the energies of delta and error are gathered on the way."""
        settings = self.settings
        exact = torch.zeros(self.columns, device=self.device).index_fill_(0, salient, 1.0)
        factor = None
        if gram is not None:
            if self.scale32 is not None:  # the codes see the delta divided by t, so their inputs are x * t
                gram = gram * self.scale32 * self.scale32[:, None]
            if settings.rounding == "feedback":
                factor = inverse_factor(gram)
        packed, all_steps, residuals = [], [], []
        elements = BLOCK_ELEMENTS if factor is None else FEEDBACK_BLOCK_ELEMENTS
        for block in row_blocks(self.base, self.expert, self.device, elements):
            self.energy += self._checked(block.square().sum(0))
            scaled = self._scaled(block)
            codes, steps = self._nearest(scaled, salient)
            if factor is not None:
                spread = per_channel(steps, self.columns, settings.group_size)
                codes = feedback_codes(scaled, spread, settings.bits, factor, exact)
            steps = self._final_steps(scaled, codes, steps, salient, gram)
            packed.append(pack(codes.to(torch.uint8), settings.bits).cpu())
            block -= self._values(codes, steps)
            residual = _sixteen_bit(block[:, salient])
            block[:, salient] -= residual.float()
            self.residual_energy += block.square_().sum(0)
            all_steps.append(steps.cpu())
            residuals.append(residual.cpu())
        return self._result(packed, all_steps, residuals, salient)

    def error(self) -> DeltaError:
        """How far the result of `run` is from the delta."""
        output = None
        if self.input_energy is not None:
            weights = self.input_energy.double()
            weighted = float((self.energy * weights).sum())
            output = float((self.residual_energy * weights).sum()) / weighted if weighted else 0.0
        return DeltaError(self.delta_energy, float(self.residual_energy.sum()) / self.delta_energy, output)

    @staticmethod
    def _checked(energy: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(energy).all():
            raise FloatingPointError("NaN or infinity")
        return energy

    def _scaled(self, block: torch.Tensor) -> torch.Tensor:
        return block if self.inverse_scale is None else block * self.inverse_scale

    def _values(self, codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        values = centred(codes, self.settings.bits).mul_(per_channel(steps, self.columns, self.settings.group_size))
        return values if self.scale32 is None else values.mul_(self.scale32)

    def _nearest(self, block: torch.Tensor, salient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes and their least-squares steps, fitted in turns on the channels that are not salient."""
        bits, group_size = self.settings.bits, self.settings.group_size
        channels = torch.ones(self.columns, device=self.device).index_fill_(0, salient, 0.0)
        rest = _without(block, salient)
        steps = initial_steps(rest, bits, group_size, channels)
        for _ in range(1 if bits == 1 else FIT_ROUNDS):  # at 1 bit the code is the sign, whatever the step
            codes = round_to_codes(block, per_channel(steps, self.columns, group_size), bits)
            steps = least_squares_steps(rest, _zeroed(centred(codes, bits), salient), group_size)
        return codes, steps

    def _final_steps(
        self,
        block: torch.Tensor,
        codes: torch.Tensor,
        steps: torch.Tensor,
        salient: torch.Tensor,
        gram: torch.Tensor | None,
    ) -> torch.Tensor:
        group_size = self.settings.group_size
        rest, multiples = _without(block, salient), _zeroed(centred(codes, self.settings.bits), salient)
        if self.settings.steps == "unbiased":
            steps = unbiased_steps(rest, multiples, group_size)
        elif self.settings.rounding == "feedback" or self.settings.steps == "layerwise":
            steps = least_squares_steps(rest, multiples, group_size)
        if self.settings.steps == "layerwise" and gram is not None:
            # One factor a row: groups keep the proportions that least squares gave them.
            multiples *= per_channel(steps, self.columns, group_size)
            steps = steps * layerwise_steps(rest, multiples, gram)
        if not self.settings.group_size:
            return steps
        # Grouped steps are stored in fp16 where they fit: rounded here, so that residuals are taken after it.
        return steps.half().float() if _fits_half(steps) else steps

    def _result(
        self,
        packed: list[torch.Tensor],
        steps: list[torch.Tensor],
        residuals: list[torch.Tensor],
        salient: torch.Tensor,
    ) -> QuantizedDelta:
        joined = torch.cat(steps)
        if self.settings.group_size and torch.equal(joined.half().float(), joined):
            joined = joined.half()
        return QuantizedDelta(
            self.settings.bits,
            self.columns,
            self.settings.group_size,
            torch.cat(packed),
            joined,
            salient.to(dtype=torch.int32, device="cpu"),
            torch.cat(residuals),
            None if self.scale is None else self.scale.cpu(),
        )


def _zeroed(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Set columns to zero, in place."""
    return block.index_fill_(1, columns, 0.0) if columns.numel() else block


def _without(block: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The block with columns set to zero: the block itself where there are none."""
    return block.index_fill(1, columns, 0.0) if columns.numel() else block


def _fits_half(steps: torch.Tensor) -> bool:
    positive = steps[steps > 0]
    return positive.numel() == 0 or bool(positive.min() >= _FP16_SMALLEST_NORMAL and positive.max() <= _FP16_MAX)


def _sixteen_bit(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-_FP16_MAX, _FP16_MAX).half()
