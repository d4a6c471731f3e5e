"""CPU figures of `expert_linear` against PyTorch's own dense linear, all in one run.

    python kernels/benchmarks/cpu_linear.py [--model Mistral-7B] [--bits 2] [--rank 32]

Prints the tables of docs/results/kernels-cpu.md. The floor of a row is the bytes it must read over the read
bandwidth measured at the start; weights that fit the last-level cache can beat it.
"""

from __future__ import annotations

import argparse

import torch
from common import SHAPES, commit, delta_bytes, load_experts, machine, median_times, read_bandwidth, table
from torch.nn.functional import linear

from meswitch_kernels import Capacity, ExpertBank, cpu_groups, expert_linear

EXPERTS = 8
PREFILL_TOKENS = 256


def measure(
    name: str, out_features: int, in_features: int, bits: int, rank: int, bandwidth: float
) -> list[list[object]]:
    """The decode row, the mixed row and the prefill row of one layer."""
    weight = torch.randn(out_features, in_features).mul(in_features**-0.5).to(torch.bfloat16)
    delta = torch.randn_like(weight)
    bank = ExpertBank(EXPERTS, in_features, out_features, Capacity(bits=bits, salient=8, rank=rank))
    load_experts(bank, EXPERTS, in_features, out_features, bits)
    dense = [weight] + [torch.randn_like(weight) for _ in range(EXPERTS - 1)]
    x = torch.randn(EXPERTS, in_features).to(torch.bfloat16)
    many = torch.randn(PREFILL_TOKENS, in_features).to(torch.bfloat16)
    slots = torch.arange(EXPERTS, dtype=torch.int32)
    one = torch.zeros(1, dtype=torch.int32)
    same = torch.zeros(PREFILL_TOKENS, dtype=torch.int32)
    large = weight.numel() > 4 << 20
    repeats = 15 if large else 200

    alone, ours, pair, mixed, separate = median_times(
        [
            lambda: linear(x[:1], weight),
            lambda: expert_linear(x[:1], weight, None, bank, one),
            lambda: linear(x[:1], weight) + linear(x[:1], delta),
            lambda: expert_linear(x, weight, None, bank, slots),
            lambda: [linear(x[i : i + 1], dense[i]) for i in range(EXPERTS)],
        ],
        repeats,
    )
    product, merged = median_times(
        [lambda: linear(many, weight), lambda: expert_linear(many, weight, None, bank, same)],
        7 if large else 40,
    )
    own = delta_bytes(in_features, out_features, bits, rank=rank)
    floor = (weight.nbytes + own) / bandwidth
    floor_mixed = (weight.nbytes + EXPERTS * own) / bandwidth
    us = 1e6
    return [
        [name, f"{alone * us:.0f}", f"{pair * us:.0f}", f"{ours * us:.0f}", f"{floor * us:.0f}", f"{ours / alone:.2f}"],
        [name, f"{separate * us:.0f}", f"{mixed * us:.0f}", f"{floor_mixed * us:.0f}", f"{mixed / separate:.2f}"],
        [name, f"{product * us:.0f}", f"{merged * us:.0f}", f"{floor * us:.0f}", f"{merged / product:.2f}"],
    ]


def crossover(name: str, out_features: int, in_features: int, bits: int, rank: int) -> list[list[object]]:
    """Both ways of the CPU backend for a growing number of tokens of one expert."""
    weight = torch.randn(out_features, in_features).mul(in_features**-0.5).to(torch.bfloat16)
    bank = ExpertBank(1, in_features, out_features, Capacity(bits=bits, salient=8, rank=rank))
    load_experts(bank, 1, in_features, out_features, bits)
    rows: list[list[object]] = []
    for tokens in (2, 4, 8, 16, 32, 64):
        x = torch.randn(tokens, in_features).to(torch.bfloat16)
        slots = torch.zeros(tokens, dtype=torch.int32)
        times = []
        for limit in (1 << 30, 1):
            cpu_groups.PREFILL_TOKENS = limit
            times += median_times([lambda x=x, slots=slots: expert_linear(x, weight, None, bank, slots)], 15)
        rows.append([name, tokens, *(f"{seconds * 1e6:.0f}" for seconds in times)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0, help="of every expert's low-rank part")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(
        f"{machine()}; commit {commit()}; reads memory at {bandwidth / 1e9:.1f} GB/s; {options.bits} bits, 8 salient, "
        f"rank {options.rank}"
    )
    rows = []
    for model in options.model or SHAPES:
        for layer, (out_features, in_features) in SHAPES[model].items():
            name = f"{model} {layer} {out_features}x{in_features}"
            rows.append(measure(name, out_features, in_features, options.bits, options.rank, bandwidth))
    decode, mixed, prefill = zip(*rows, strict=True)
    print("\nOne token on one expert, microseconds (goal: ratio 1.5, and faster than base and dense delta)\n")
    print(table(["layer", "dense base", "base + dense delta", "expert_linear", "floor", "ratio to base"], decode))
    print("\nEight tokens on eight experts, microseconds (goal: ratio 0.5)\n")
    print(table(["layer", "8 dense models", "expert_linear", "floor", "ratio"], mixed))
    print(f"\nPrefill of {PREFILL_TOKENS} tokens of one expert, microseconds (goal: ratio 1.3)\n")
    print(table(["layer", "dense linear", "expert_linear", "floor of bytes", "ratio"], prefill))
    rows = [
        row
        for model in options.model or SHAPES
        for row in crossover(f"{model} q, o", *SHAPES[model]["q, o"], options.bits, options.rank)
    ]
    print("\nTokens of one expert, microseconds: kernels on codes, or merged weights through BLAS\n")
    print(table(["layer", "tokens", "codes", "merged"], rows))


if __name__ == "__main__":
    main()
