"""A delta's largest singular directions, kept as two factors L·R beside the codes of what they leave.

A fine-tune's few largest directions hold much of its effect; they take few bytes, and a coarse code serves them badly:
its errors point against them (zeros of the delta, half of a short bf16 fine-tune, round to the side that is not theirs)
and add up. So the delta without its directions is what is coded, and the factors are fitted last, to the delta without
the codes' values. KL on 12 choice items of the code expert, 1 bit, rank 16: 0.28 % of the base's with the factors
fitted first and then left alone, 0.19 with codes of the whole delta, **0.024** as here; without a low-rank part, and 8
salient channels for the same bytes, 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import torch

from meswitch_cli.delta.codes import WORD_BITS, pack, unpack
from meswitch_cli.delta.steps import (
    FIT_ROUNDS,
    codes_of,
    column_energy,
    dots,
    initial_steps,
    nearest_multiples,
    step_ratio,
)
from meswitch_cli.delta.sweep import one_thread

#: Code width of the factors. In the same bytes 32 vectors at 2 bits gave three times the KL of 16 at 4; at 16 bits, for
#: four times the bytes, a quarter of it went.
FACTOR_BITS = 4
#: Widths that the factors of a low-rank part that stands alone may have, as an adapter's does; at 16 they are no codes.
FACTOR_WIDTHS = (4, 8, 16)
HALF_BITS = 16
#: The exponent of a stored vector's largest value, and below: fp16 ends at 2^16.
_LARGEST_EXPONENT = 14
_BYTE_BITS = 8
#: Of the artifact's format, the first whose readers know such parts.
ALONE_VERSION = 4
#: More directions than asked for are looked at, and how often the delta is applied to them (Halko, Martinsson and
#: Tropp 2011, section 4.5).
OVERSAMPLING, POWER_ITERATIONS = 8, 1

_Result = TypeVar("_Result")


def vectors_of(stored: torch.Tensor, steps: torch.Tensor, length: int, bits: int = FACTOR_BITS) -> torch.Tensor:
    """The vectors, fp32 `[rank, length]`, that a factor's stored codes, or values of 16 bits, and steps stand for."""
    if bits == HALF_BITS:
        return stored.float() * steps.float()
    return (unpack(stored, bits, length).float() - ((1 << bits) - 1) / 2) * steps.float()


class Rounded(NamedTuple):
    """Vectors as they are stored, codes `[rank, ceil(length * bits / 32)]` int32 or at 16 bits fp16 `[rank, length]`;
    their steps `[rank, 1]` and values `[rank, length]`."""

    stored: torch.Tensor
    steps: torch.Tensor
    values: torch.Tensor


class Directions(NamedTuple):
    """Leading singular directions of a delta, left `[out, rank]` and right `[rank, in]`, rounded as factors are stored.

    `energy` `[in]` are the squared norms of the delta's columns, float64.
    """

    left: torch.Tensor
    right: torch.Tensor
    energy: torch.Tensor


class Sweep(Protocol):
    """Applies a function to the delta's blocks of rows, `[rows, in]` fp32, and their places; results come in order."""

    def __call__(self, work: Callable[[torch.Tensor, slice], _Result]) -> Iterator[_Result]: ...


def leading_directions(
    sweep: Sweep, shape: tuple[int, int], rank: int, device: torch.device | str, bits: int = FACTOR_BITS
) -> Directions:
    """Randomised singular value decomposition of a delta `[out, in]` that is only seen block by block.

    `bits` are those of a factor's numbers.

    Raises:
        FloatingPointError: a weight is NaN or infinite.
    """
    width = min(rank + OVERSAMPLING, *shape)
    energy = torch.zeros(shape[1], dtype=torch.float64, device=device)
    drawn = torch.randn(shape[1], width, generator=torch.Generator().manual_seed(0)).to(device)
    parts = []
    for image, part in sweep(lambda block, _: (block @ drawn, column_energy(block))):
        parts.append(image)
        energy += part
    if not torch.isfinite(energy).all():
        raise FloatingPointError("NaN or infinity")
    basis = orthonormal(torch.cat(parts))
    for _ in range(POWER_ITERATIONS):
        across = orthonormal(_applied_across(sweep, basis).T)
        basis = orthonormal(torch.cat(list(sweep(lambda block, _, across=across: block @ across))))  # type: ignore[misc]
    seen = _applied_across(sweep, basis)
    with one_thread():
        turn = torch.linalg.eigh((seen @ seen.T).double()).eigenvectors.flip(1)[:, :rank].float()
        left, right = rounded((basis @ turn).T.contiguous(), bits), rounded(turn.T @ seen, bits)
    return Directions(left.values.T, right.values, energy)


class FactorFit(NamedTuple):
    """Factors, the columns of L and the rows of R, and what they leave: of the channels that are kept exactly all of
    it, `[out, k]`, of each column the energy, float64 `[in]`."""

    left: Rounded
    right: Rounded
    left_over: torch.Tensor
    energy: torch.Tensor


def fit_factors(
    sweep: Sweep, images: torch.Tensor, exact: torch.Tensor, shape: tuple[int, int], bits: int = FACTOR_BITS
) -> FactorFit:
    """The factors of what a sweep shows, `[out, in]`.

    Args:
        images: `[out, rank]`, its products with vectors near its right directions.
        exact: `[k]`, columns that need no approximation; their energy is as if they had none.
        bits: of a factor's numbers.
    """
    basis = orthonormal(images).T.contiguous()
    with one_thread():
        left = rounded(basis, bits)
    both = torch.cat([basis, left.values])

    def products_of(block: torch.Tensor, place: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return both[:, place] @ block, column_energy(block), block[:, exact]

    products = torch.zeros(len(both), shape[1], device=images.device)
    energy = torch.zeros(shape[1], dtype=torch.float64, device=images.device)
    channels = []
    for product, part, some in sweep(products_of):
        products += product
        energy += part
        channels.append(some)
    wanted, seen = products.chunk(2)
    with one_thread():
        right = rounded(wanted.index_fill(1, exact, 0.0), bits)
        energy -= (right.values * (2 * seen - (left.values @ left.values.T) @ right.values)).sum(0)
        left_over = torch.cat(channels) - left.values.T @ right.values[:, exact]
    return FactorFit(left, right, left_over, energy.clamp_(min=0))


def rounded(vectors: torch.Tensor, bits: int = FACTOR_BITS) -> Rounded:
    """Round vectors `[rank, length]` to what factors of so many bits store; codes have unbiased steps.

    Not least squares, here above all: its shrinkage, 1 % at 4 bits, is a hundredth of the largest directions' effect.
    At 16 bits each vector is stored times a power of two that fills fp16's range: one in bf16 or fp16 loses nothing.
    """
    if bits == FACTOR_BITS:
        return _fitted(vectors)
    largest = vectors.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if bits == HALF_BITS:
        # Not the exponent of float32's own range: a step below its normal numbers would be rounded itself.
        steps = torch.exp2((torch.floor(torch.log2(largest)) - _LARGEST_EXPONENT).clamp(min=-126))
        stored = (vectors / steps).half()
        return Rounded(stored, steps, stored.float() * steps)
    steps = largest / ((1 << bits) / 2)
    limit = (1 << bits) / 2 - 0.5
    multiples = (vectors / steps).floor_().add_(0.5).clamp_(-limit, limit)
    codes = (multiples + limit).to(torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (WORD_BITS // _BYTE_BITS)))
    steps = step_ratio(dots(vectors, vectors, 0), dots(multiples, vectors, 0))
    words = padded.flatten().view(torch.int32).view(len(padded), -1)  # flat: a single row may have any stride
    return Rounded(words, steps, multiples * steps)


def _fitted(vectors: torch.Tensor) -> Rounded:
    """At 4 bits, the steps fitted in turns with the codes."""
    energy = dots(vectors, vectors, 0)
    steps = initial_steps(energy, FACTOR_BITS, torch.full_like(energy, vectors.shape[1]))
    for _ in range(FIT_ROUNDS):
        multiples = nearest_multiples(vectors, steps, FACTOR_BITS)
        projection = dots(multiples, vectors, 0)
        steps = step_ratio(projection, dots(multiples, multiples, 0))
    steps = step_ratio(energy, projection)
    return Rounded(pack(codes_of(multiples, FACTOR_BITS), FACTOR_BITS), steps, multiples * steps)


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis `[out, width]` of the columns' span, in their order; the same with any number of threads."""
    with one_thread():
        basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def _applied_across(sweep: Sweep, basis: torch.Tensor) -> torch.Tensor:
    """basisᵀ·delta `[width, in]`."""
    total = None
    for part in sweep(lambda block, rows: basis[rows].T @ block):
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
