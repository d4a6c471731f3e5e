"""From a base and an expert weight to a low-bit delta with salient channels, and back.

Rows are independent, so everything runs on blocks of rows that stay in the processor's cache; only column sums
(channel scales, reconstruction errors) span blocks, each in a sweep of its own before the one that quantises.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from meswitch_cli.delta.codes import TrellisCode
from meswitch_cli.delta.feedback import inverse_factor
from meswitch_cli.delta.low_rank import HALF_BITS, Directions, FactorFit, fit_factors, leading_directions
from meswitch_cli.delta.rounding import FP16_MAX, Rounder, sixteen_bit
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.delta.steps import column_energy, per_channel, without
from meswitch_cli.delta.stored import StoredDelta
from meswitch_cli.delta.sweep import RowBlocks

#: Blocks of a tensor that decide how much its outputs' projection is off: one number does not need all of them.
OUTPUT_BLOCKS = 16


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


class Energies(NamedTuple):
    """Squared norms of the columns, float64 `[in]`: of a delta, and of what its compressed form misses."""

    delta: torch.Tensor
    missed: torch.Tensor

    def error(self, input_energy: torch.Tensor | None) -> DeltaError:
        """The error of a delta that is not zero; `input_energy` `[in]` is the inputs'."""
        total, output = float(self.delta.sum()), None
        if input_energy is not None:
            weights = input_energy.double()
            weighted = float((self.delta * weights).sum())
            output = float((self.missed * weights).sum()) / weighted if weighted else 0.0
        return DeltaError(total, float(self.missed.sum()) / total, output)


def quantize(
    base: torch.Tensor,
    expert: torch.Tensor,
    settings: QuantizerSettings,
    statistics: InputStatistics | None = None,
    device: torch.device | str = "cpu",
) -> tuple[StoredDelta, DeltaError] | None:
    """Compress `expert - base`, both `[out, in]` of any floating dtype; None where the two are equal.

    Salient channels are the k with the largest E_i = a_i * sum_o (d_oi - d_hat_oi)^2, a_i the input's energy (1
    without calibration); steps are fitted on the other channels (ME-Switch, arXiv 2406.09041, section 4.1). With a
    low-rank part all this is done on the delta without its leading directions, see `low_rank`; with 0 bits that part is
    all there is.

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
    input_energy = None if statistics is None else statistics.energy.to(device)
    inputs = None if statistics is None or statistics.inputs is None else statistics.inputs.to(device)

    whole = coded = RowBlocks(base, expert, device)
    directions = None
    if settings.rank:
        left, right, _ = directions = leading_directions(
            whole.tall, whole.shape, min(settings.rank, *whole.shape), device, settings.factor_bits
        )
        if not settings.bits:
            delta, energies = _directions_alone(directions, whole, settings.factor_bits)
            return (delta, energies.error(input_energy)) if float(energies.delta.sum()) else None
        coded = whole.less(lambda block, place: block.addmm_(left[place], right, alpha=-1))
    scale = _channel_scale(coded) if settings.channel_scale == "rms" else None
    nothing = torch.empty(0, dtype=torch.long, device=device)
    rounder = Rounder(settings=settings, scale=None if scale is None else scale.float(), salient=nothing)
    rounder = replace(rounder, salient=_salient_channels(coded, rounder, input_energy))
    if rounder.scale is not None:  # the codes see the delta divided by t, so their inputs are x * t
        gram = None if gram is None else gram * rounder.scale * rounder.scale[:, None]
        inputs = None if inputs is None else inputs * rounder.scale
    factor = inverse_factor(gram) if gram is not None and settings.rounding == "feedback" else None
    rounder = replace(rounder, gram=gram, factor=factor)
    if settings.steps == "output-unbiased":
        rounder = replace(rounder, output_factor=_output_factor(coded, rounder, inputs))

    if directions is None:
        delta, energies = _quantized(coded, rounder)
    else:
        delta, energies = _quantized_beside(directions, whole, coded, rounder)
    if not float(energies.delta.sum()):
        return None
    return replace(delta, channel_scale=None if scale is None else scale.cpu()), energies.error(input_energy)


def dequantize(delta: StoredDelta) -> torch.Tensor:
    """The delta that codes and all that is added to them stand for, or a low-rank part alone; fp32 `[out, in]`."""
    factors = delta.factors()
    if factors is not None and not delta.bits:
        return factors[0] @ factors[1]
    values = delta.multiples()
    values *= per_channel(delta.coded[1].float(), delta.in_features, delta.group_size)
    if delta.channel_scale is not None:
        values *= delta.channel_scale.float()
    if factors is not None:
        values += factors[0] @ factors[1]
    if delta.salient_value is not None:
        values[:, delta.salient_channels] += delta.salient_value.float()
    return values


def expert_value(delta: StoredDelta, base: torch.Tensor) -> torch.Tensor:
    """The weight fp32 `[out, in]` of an expert whose base's is `base` of as many rows, rows that it added apart."""
    value = base.to(torch.float32, copy=True)
    factors = delta.factors()
    if delta.bits:
        value += dequantize(delta)
    elif factors is not None:
        value.addmm_(*factors)
    return value


def _channel_scale(blocks: RowBlocks) -> torch.Tensor:
    """RMS of each column over the mean RMS, as fp16: the steps carry the size, so that fp16 has range to spare."""
    rms = blocks.column_sum(column_energy).sqrt()
    return torch.nan_to_num(rms / rms.mean(), nan=0.0).clamp(max=FP16_MAX).half()


def _salient_channels(blocks: RowBlocks, rounder: Rounder, input_energy: torch.Tensor | None) -> torch.Tensor:
    """Indices `[k]` of the channels whose reconstruction error costs most, ascending; `rounder` has none yet."""
    if not rounder.settings.salient:
        return rounder.salient

    def column_error(block: torch.Tensor) -> torch.Tensor:
        fit = rounder.fit(rounder.scaled(block), rounds=1)
        return column_energy(block.sub_(rounder.values(fit.multiples, fit.least_squares)))

    # A search takes as long as all else: of a large tensor a few blocks tell which columns stand out.
    searched = isinstance(rounder.settings.coding, TrellisCode)
    error = blocks.column_sum(
        column_error,
        rounder.block_elements(blocks.shape[1]) if searched else None,
        most=OUTPUT_BLOCKS if searched else 0,
    )
    if input_energy is not None:
        error *= input_energy
    return error.topk(rounder.settings.salient).indices.sort().values


def _output_factor(blocks: RowBlocks, rounder: Rounder, inputs: torch.Tensor | None) -> float:
    """What to multiply unbiased steps by so that <D_hat, D> = <D, D> holds for the outputs: summed over all rows,
    in the metric H = sum x x^T, the rounder's `gram` or by the inputs themselves; 1 where the inputs are unknown.

    One factor for the tensor: a row's own is too uncertain with few tokens (docs/results/compression.md). Of a
    large tensor every so many blocks are asked.
    """
    gram = rounder.gram
    if gram is None and inputs is None:
        return 1.0

    def projections(block: torch.Tensor, _: slice) -> torch.Tensor:
        scaled = rounder.scaled(block)
        fit = rounder.rounded(scaled)
        rest = without(scaled, rounder.salient)
        values = without(rounder.spread(fit.multiples, fit.unbiased), rounder.salient)
        if gram is not None:
            seen = rest @ gram
            return torch.stack([(seen * rest).sum(), (seen * values).sum()]).double()
        assert inputs is not None
        seen = rest @ inputs.T
        return torch.stack([seen.square().sum(), (seen * (values @ inputs.T)).sum()]).double()

    own, kept = (
        torch.stack(list(blocks.sweep(projections, rounder.block_elements(blocks.shape[1]), most=OUTPUT_BLOCKS)))
        .sum(0)
        .tolist()
    )
    return float(own / kept) if own > 0 and kept > 0 else 1.0


def _quantized(blocks: RowBlocks, rounder: Rounder) -> tuple[StoredDelta, Energies]:
    """Codes, steps and the salient channels' residuals."""
    salient = rounder.salient

    def quantise(block: torch.Tensor, _: slice) -> tuple[torch.Tensor, ...]:
        codes, steps, energy = rounder.code(block)
        residual = sixteen_bit(block[:, salient])
        block[:, salient] -= residual.float()
        return codes, steps, residual.cpu(), energy, column_energy(block)

    codes, steps, residuals, energies, missed = zip(
        *blocks.sweep(quantise, rounder.block_elements(blocks.shape[1])), strict=True
    )
    delta = _with_salient(_coded(blocks, rounder, codes, steps), rounder.salient, torch.cat(residuals))
    return delta, Energies(_finite_sum(energies), _finite_sum(missed))


def _quantized_beside(
    directions: Directions, whole: RowBlocks, rest: RowBlocks, rounder: Rounder
) -> tuple[StoredDelta, Energies]:
    """Codes and steps of what the directions leave; then factors for the whole without the codes' values; then the
    salient channels' residuals to both."""
    salient = rounder.salient
    seen = without(directions.right, salient)  # salient channels will be exact: no vector need reach for them
    of_directions = directions.right @ seen.T

    def quantise(block: torch.Tensor, place: slice) -> tuple[torch.Tensor, ...]:
        codes, steps, energy = rounder.code(block)
        return codes, steps, block @ seen.T + directions.left[place] @ of_directions, energy

    codes, steps, images, energies = zip(*rest.sweep(quantise, rounder.block_elements(rest.shape[1])), strict=True)
    _finite_sum(energies)
    coded = _coded(whole, rounder, codes, steps)

    def take_codes_off(block: torch.Tensor, place: slice) -> None:
        own = coded.mapped(lambda part: part[place].to(whole.device))
        block.sub_(rounder.values(own.multiples(), own.coded[1].float()))

    bits = rounder.settings.factor_bits
    fit = fit_factors(whole.less(take_codes_off).tall, torch.cat(images), salient, whole.shape, bits)
    residual = sixteen_bit(fit.left_over)
    fit.energy[salient] = column_energy(fit.left_over - residual.float()).double()
    return _with_factors(_with_salient(coded, salient, residual), fit, bits), Energies(directions.energy, fit.energy)


def _directions_alone(directions: Directions, whole: RowBlocks, bits: int) -> tuple[StoredDelta, Energies]:
    """Factors of the whole, and nothing beside them."""
    images = torch.cat(list(whole.tall(lambda block, _: block @ directions.right.T)))
    fit = fit_factors(whole.tall, images, torch.empty(0, dtype=torch.long, device=whole.device), whole.shape, bits)
    alone = StoredDelta(in_features=whole.shape[1], out_features=whole.shape[0])
    return _with_factors(alone, fit, bits), Energies(directions.energy, fit.energy)


def _with_factors(delta: StoredDelta, fit: FactorFit, bits: int) -> StoredDelta:
    form = "values" if bits == HALF_BITS else "codes"
    factors: dict[str, Any] = {"factor_bits": bits}
    for side, vectors in (("left", fit.left), ("right", fit.right)):
        factors |= {f"{side}_{form}": vectors.stored.cpu(), f"{side}_steps": vectors.steps.cpu()}
    return replace(delta, **factors)


def _coded(
    blocks: RowBlocks, rounder: Rounder, codes: tuple[torch.Tensor, ...], steps: tuple[torch.Tensor, ...]
) -> StoredDelta:
    """The codes and steps of all blocks."""
    joined = torch.cat(steps)
    if rounder.settings.group_size and torch.equal(joined.half().float(), joined):
        joined = joined.half()
    code = rounder.settings.coding
    return StoredDelta(
        bits=code.bits,
        trellis=code if isinstance(code, TrellisCode) else None,
        in_features=blocks.shape[1],
        group_size=rounder.settings.group_size,
        codes=torch.cat(codes),
        steps=joined,
    )


def _with_salient(delta: StoredDelta, salient: torch.Tensor, residual: torch.Tensor) -> StoredDelta:
    if not salient.numel():
        return delta
    index = salient.to(dtype=torch.int32, device="cpu")
    return replace(delta, salient_index=index, salient_value=residual.cpu())


def _finite_sum(energies: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum over blocks, float64 `[in]`."""
    total = functools.reduce(torch.add, (energy.double() for energy in energies))
    if not torch.isfinite(total).all():
        raise FloatingPointError("NaN or infinity")
    return total
