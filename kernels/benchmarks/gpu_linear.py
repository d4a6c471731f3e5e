"""GPU figures of `expert_linear` on Mistral-7B's linears, against the card's own bandwidth and matrix rate.

    python kernels/benchmarks/gpu_linear.py [--bits 2 --rank 0] ...

Decode: one layer's four kinds of linear for 1 to 64 tokens spread over 1 to 16 experts, replayed from a CUDA
graph and over weights too many for the cache. Prefill: 128 to 8192 tokens of one expert against cuBLAS on
merged weights. Prints one line of JSON a row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from common import (
    SHAPES,
    capacity_for,
    copy_bandwidth,
    delta_bytes,
    graph_seconds,
    load_experts,
    matrix_rate,
    parse_bits,
    rotating,
    say,
    scaled_at,
)
from torch import Tensor
from torch.nn.functional import linear

from meswitch_kernels import ExpertBank, expert_linear, group_tokens
from meswitch_kernels.dispatch import backend_module

SLOTS = 16
LAYERS = SHAPES["Mistral-7B"]
#: (experts, tokens) of the decode rows.
BATCHES = ((1, 1), (1, 16), (1, 64), (4, 4), (4, 16), (16, 16), (16, 64))
#: (bits, rank).
FORMATS = ((2, 0), (1, 16), (0.25, 16), (1, 0), (4, 0))
CACHE_BYTES = 128 << 20
"""More than the last-level cache of any card today, so that rotating operands come from memory."""


def copies_of(nbytes: int) -> int:
    return max(2, -(-2 * CACHE_BYTES // nbytes))


def decode(name: str, shape: tuple[int, int], formats: list[tuple[int, int]], bandwidth: float) -> None:
    """Rows of the decode table of one layer."""
    out_features, in_features = shape
    copies = min(16, copies_of(out_features * in_features * 2))
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    alone: dict[int, float] = {}
    for bits, rank in formats:
        capacity = capacity_for(bits, salient=8, rank=rank, channel_scale=scaled_at(bits))
        banks = [ExpertBank(SLOTS, in_features, out_features, capacity, device="cuda") for _ in range(2)]
        for bank in banks:
            load_experts(bank, SLOTS, in_features, out_features, bits, scaled_at(bits))
        for experts, tokens in BATCHES:
            x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
            slots = torch.arange(tokens, dtype=torch.int32, device="cuda") % experts
            groups = group_tokens(slots, SLOTS)

            def base(i: int, x: Tensor = x) -> Callable[[], object]:
                return lambda: linear(x, weights[i])

            def ours(
                i: int, x: Tensor = x, slots: Tensor = slots, groups: object = groups, banks: list[ExpertBank] = banks
            ) -> Callable[[], object]:
                return lambda: expert_linear(x, weights[i], None, banks[i % 2], slots, groups)

            if tokens not in alone:
                alone[tokens] = graph_seconds(rotating(base, copies))
            fused = graph_seconds(rotating(ours, copies))
            moved = weights[0].nbytes + experts * delta_bytes(in_features, out_features, bits, rank=rank)
            say(
                "linear_decode",
                layer=name,
                bits=bits,
                rank=rank,
                experts=experts,
                tokens=tokens,
                mb_moved=moved / 1e6,
                us=fused * 1e6,
                of_bandwidth=moved / fused / bandwidth,
                base_us=alone[tokens] * 1e6,
                times_base=fused / alone[tokens],
            )


def prefill(name: str, shape: tuple[int, int], bits: float, rank: int, rate: float) -> None:
    """Rows of the prefill table of one layer."""
    out_features, in_features = shape
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    capacity = capacity_for(bits, salient=8, rank=rank, channel_scale=scaled_at(bits))
    bank = ExpertBank(1, in_features, out_features, capacity, device="cuda")
    load_experts(bank, 1, in_features, out_features, bits, scaled_at(bits))
    merged = (weight.float() + bank.dequantize(0)).to(torch.bfloat16)
    for tokens in (128, 512, 2048, 8192):
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        slots = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        cublas = graph_seconds(lambda x=x: linear(x, merged), replays=5)
        planned = backend_module("triton").group_tokens(slots, 1, [(0, tokens)])
        for which, groups in (("as the engine plans", planned), ("without a plan", group_tokens(slots, 1))):
            ours = graph_seconds(
                lambda x=x, slots=slots, groups=groups: expert_linear(x, weight, None, bank, slots, groups), replays=5
            )
            say(
                "linear_prefill",
                layer=name,
                bits=bits,
                rank=rank,
                tokens=tokens,
                which=which,
                merged=groups.plan is not None and bool(groups.plan.merged),
                us=ours * 1e6,
                of_matrix_rate=2 * tokens * out_features * in_features / ours / rate,
                cublas_us=cublas * 1e6,
                of_cublas_on_merged=cublas / ours,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=parse_bits, help="of every expert's codes; without it five formats in turn")
    parser.add_argument("--rank", type=int, default=0, help="of every expert's low-rank part, with --bits")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_linear needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    formats = [(options.bits, options.rank)] if options.bits else list(FORMATS)
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    say("rates", copy_gb_per_s=bandwidth / 1e9, matrix_tflops=rate / 1e12)
    for layer, shape in LAYERS.items():
        decode(layer, shape, formats, bandwidth)
    for layer, shape in LAYERS.items():
        prefill(layer, shape, *formats[0], rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
