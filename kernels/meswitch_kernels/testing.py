"""Synthetic experts and calls, shared by the tests and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import naive
from .bank import BankTensors, ExpertBank
from .delta import Capacity, ExpertDelta
from .messages import FIRST_NUMBER, MESSAGES, code_width, row_words
from .packing import group_count, pack_codes

SLOT_PATTERNS = ("base", "one", "different", "skewed", "mixed")

ERROR_BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Largest ‖y − truth‖ / ‖truth‖ by the dtype of x, the truth being `naive` in float64 on the same inputs.

Half precision rounds the output once (up to 2^-9 bfloat16, 2^-12 float16, relative), and in prefill W + Δ̂.
"""


def random_expert(
    seed: int,
    in_features: int,
    out_features: int,
    bits: int = 2,
    group_size: int = 0,
    k: int = 8,
    channel_scale: bool = False,
    bias: bool = False,
    added: int = 0,
    rank: int = 0,
) -> ExpertDelta:
    """An expert whose delta is about as large as a base weight of variance 1 / in_features.

    So is its low-rank part, where it has one. `bits` may be the number of a message (`messages.MESSAGES`). With 0 bits
    it has neither codes nor what goes with them.
    """
    factors = random_low_rank(seed, in_features, out_features, rank) if rank else (None, None)
    rng = torch.Generator().manual_seed(seed)
    if not bits:
        return replace(
            ExpertDelta.of_nothing(in_features, out_features),
            bias_delta=torch.randn(out_features, generator=rng) if bias else None,
            added_rows=torch.randn(added, in_features, generator=rng).to(torch.bfloat16) if added else None,
            left=factors[0],
            right=factors[1],
        )
    message = bits - FIRST_NUMBER if bits > FIRST_NUMBER else 0
    if message:
        shape = (out_features, row_words(in_features, bits))
        packed = torch.randint(-(2**31), 2**31, shape, generator=rng).to(torch.int32)
    else:
        packed = pack_codes(torch.randint(0, 2**bits, (out_features, in_features), generator=rng), bits)
    scale = in_features**-0.5
    steps = (
        torch.rand(out_features, group_count(in_features, 0 if message else group_size), generator=rng) + 0.5
    ) * scale
    index = torch.randperm(in_features, generator=rng)[:k].sort().values.to(torch.int32)
    value = torch.randn(out_features, k, generator=rng).mul(4 * scale).to(torch.bfloat16)
    channel = (torch.rand(in_features, generator=rng) + 0.5).to(torch.float16) if channel_scale else None
    return ExpertDelta(
        codes=packed,
        steps=steps.to(torch.float16),
        salient_index=index,
        salient_value=value,
        channel_scale=channel,
        bias_delta=torch.randn(out_features, generator=rng) if bias else None,
        bits=code_width(bits),
        message=message,
        group_size=0 if message else group_size,
        added_rows=torch.randn(added, in_features, generator=rng).to(torch.bfloat16) if added else None,
        left=factors[0],
        right=factors[1],
    )


def random_low_rank(seed: int, in_features: int, out_features: int, rank: int) -> tuple[Tensor, Tensor]:
    """L `[out, rank]` and R `[rank, in]` in bfloat16, whose product has elements of variance 1 / in_features."""
    rng = torch.Generator().manual_seed(seed)
    left = torch.randn(out_features, rank, generator=rng) * rank**-0.5
    right = torch.randn(rank, in_features, generator=rng) * in_features**-0.5
    return left.to(torch.bfloat16), right.to(torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """The arguments of one `expert_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    bank: ExpertBank
    slot_of_token: Tensor

    def truth(self) -> Tensor:
        """The answer, from `naive` in float64, on the CPU."""
        bias = None if self.bias is None else self.bias.double().cpu()
        held = self.bank.tensors
        tensors = BankTensors._make(t.cpu() if isinstance(t, Tensor) else t for t in held)
        slots = self.slot_of_token.cpu()
        return naive.expert_linear(self.x.double().cpu(), self.weight.double().cpu(), bias, tensors, slots)

    def with_tokens(self, x: Tensor, slot_of_token: Tensor) -> Call:
        """The same layer called on other tokens."""
        return replace(self, x=x, slot_of_token=slot_of_token)


def slots_for(pattern: str, tokens: int, slots: int) -> Tensor:
    """int32 `[tokens]`: all on the base, one slot, all slots in turn, skewed to slot 0, or base and all."""
    turn = torch.arange(tokens, dtype=torch.int32)
    if pattern == "base":
        return torch.full_like(turn, -1)
    if pattern == "one":
        return torch.full_like(turn, slots - 1)
    if pattern == "different":
        return turn % slots
    if pattern == "skewed":
        return torch.where(turn % 5 == 4, turn % slots, 0).to(torch.int32)
    if pattern == "mixed":
        return ((turn * 7) % (slots + 1) - 1).to(torch.int32)
    raise ValueError(f"unknown slot pattern {pattern!r}; choose from {', '.join(SLOT_PATTERNS)}")


def random_call(
    tokens: int,
    in_features: int,
    out_features: int,
    *,
    bits: int | tuple[int, ...] = 2,
    group_size: int = 0,
    k: int = 8,
    channel_scale: bool = False,
    bias: bool = False,
    pattern: str = "mixed",
    slots: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
    rank: int | tuple[int, ...] = 0,
    planes: bool | None = None,
) -> Call:
    """A call with random operands. Several `bits` or ranks go to the slots in turn, in a bank that holds all."""
    rng = torch.Generator().manual_seed(seed)
    widths = (bits,) if isinstance(bits, int) else bits
    ranks = (rank,) if isinstance(rank, int) else rank
    capacity = Capacity(
        bits=max((width for width in widths if width < FIRST_NUMBER), default=0),
        messages=tuple(number for number in MESSAGES if number in widths),
        group_size=group_size,
        salient=max(k, 1),
        rank=max(ranks),
        channel_scale=channel_scale,
    )
    bank = ExpertBank(slots, in_features, out_features, capacity, dtype, device, planes)
    for slot in range(slots):
        expert = random_expert(
            seed + slot + 1,
            in_features,
            out_features,
            widths[slot % len(widths)],
            group_size,
            k,
            channel_scale,
            bias,
            rank=ranks[slot % len(ranks)],
        )
        bank.load(slot, expert)
    weight = torch.randn(out_features, in_features, generator=rng) * in_features**-0.5
    return Call(
        x=torch.randn(tokens, in_features, generator=rng).to(device, dtype),
        weight=weight.to(device, dtype),
        bias=torch.randn(out_features, generator=rng).to(device, dtype) if bias else None,
        bank=bank,
        slot_of_token=slots_for(pattern, tokens, slots).to(device),
    )


def relative_error(y: Tensor, truth: Tensor) -> float:
    """‖y − truth‖ / ‖truth‖ in float64; NaN where y holds one."""
    if not truth.numel():
        return 0.0
    truth = truth.double().cpu()
    return float((y.double().cpu() - truth).norm() / truth.norm())
