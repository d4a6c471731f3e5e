"""GPU figures of `expert_linear` on Mistral-7B's linears, against the card's own bandwidth and matrix rate.

    python kernels/benchmarks/gpu_linear.py [--rank 32]

Decode: one layer's four kinds of linear for 1 to 64 tokens spread over 1 to 16 experts, replayed from a CUDA
graph and over weights too many for the cache. Prefill: 128 to 8192 tokens of one expert against cuBLAS on
merged weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from common import SHAPES, commit, delta_bytes, graph_seconds, load_experts, rotating, table
from torch import Tensor
from torch.nn.functional import linear

from meswitch_kernels import Capacity, ExpertBank, expert_linear, group_tokens

BITS, EXPERTS = 2, 16
LAYERS = SHAPES["Mistral-7B"]
CACHE_BYTES = 128 << 20
"""More than the last-level cache of any card today, so that rotating operands come from memory."""


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    data = torch.randn(256 << 20, device="cuda", dtype=torch.float16)
    target = torch.empty_like(data)
    return 2 * data.nbytes / graph_seconds(lambda: target.copy_(data), replays=5)


def matrix_rate() -> float:
    """Multiply-adds, counted twice, per second of a large bfloat16 product through cuBLAS."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / graph_seconds(lambda: a @ b, replays=5)


def copies_of(nbytes: int) -> int:
    return max(2, -(-2 * CACHE_BYTES // nbytes))


def decode(name: str, out_features: int, in_features: int, rank: int, bandwidth: float) -> list[list[object]]:
    """Rows of the decode table of one layer."""
    copies = min(16, copies_of(out_features * in_features * 2))
    weights = [torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    capacity = Capacity(bits=BITS, salient=8, rank=rank)
    banks = [ExpertBank(EXPERTS, in_features, out_features, capacity, device="cuda") for _ in range(2)]
    for bank in banks:
        load_experts(bank, EXPERTS, in_features, out_features, BITS)
    rows = []
    for experts in (1, 2, 4, 8, 16):
        for tokens in (1, 2, 4, 8, 16, 32, 64):
            if tokens < experts:
                continue
            x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
            slots = torch.arange(tokens, dtype=torch.int32, device="cuda") % experts
            groups = group_tokens(slots, EXPERTS)

            def base(i: int, x: Tensor = x) -> Callable[[], object]:
                return lambda: linear(x, weights[i])

            def ours(i: int, x: Tensor = x, slots: Tensor = slots, groups: object = groups) -> Callable[[], object]:
                return lambda: expert_linear(x, weights[i], None, banks[i % 2], slots, groups)

            def separate(i: int, x: Tensor = x, experts: int = experts) -> Callable[[], object]:
                return lambda: [linear(x[e::experts], weights[(i + e) % copies]) for e in range(experts)]

            dense, fused, models = (graph_seconds(rotating(make, copies)) for make in (base, ours, separate))
            moved = weights[0].nbytes + experts * delta_bytes(in_features, out_features, BITS, rank=rank)
            rows.append(
                [
                    name,
                    experts,
                    tokens,
                    f"{moved / 1e6:.0f}",
                    f"{fused * 1e6:.1f}",
                    f"{moved / fused / bandwidth:.0%}",
                    f"{fused / dense:.2f}",
                    f"{fused / models:.2f}",
                ]
            )
    return rows


def prefill(name: str, out_features: int, in_features: int, rank: int, rate: float) -> list[list[object]]:
    """Rows of the prefill table of one layer."""
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    bank = ExpertBank(1, in_features, out_features, Capacity(bits=BITS, salient=8, rank=rank), device="cuda")
    load_experts(bank, 1, in_features, out_features, BITS)
    merged = (weight.float() + bank.dequantize(0)).to(torch.bfloat16)
    rows = []
    for tokens in (128, 512, 2048, 8192):
        x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
        slots = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        groups = group_tokens(slots, 1)
        cublas = graph_seconds(lambda x=x: linear(x, merged), replays=5)
        ours = graph_seconds(
            lambda x=x, slots=slots, groups=groups: expert_linear(x, weight, None, bank, slots, groups), replays=5
        )
        work = 2 * tokens * out_features * in_features
        rows.append([name, tokens, f"{ours * 1e6:.0f}", f"{work / ours / rate:.0%}", f"{cublas / ours:.0%}"])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=0, help="of every expert's low-rank part")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_linear needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    print(
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}; commit {commit()}; {BITS} bits, 8 salient, "
        f"rank {options.rank}"
    )
    print(f"copies at {bandwidth / 1e9:.0f} GB/s; cuBLAS bfloat16 at {rate / 1e12:.0f} TFLOP/s")
    rows = [row for layer, shape in LAYERS.items() for row in decode(layer, *shape, options.rank, bandwidth)]
    print("\nDecode (goals: 75 % of bandwidth; one expert 1.2 of base; 16 experts 4 of base)\n")
    header = ["layer", "experts", "tokens", "MB moved", "us", "of bandwidth", "of base alone", "of one model each"]
    print(table(header, rows))
    rows = [row for layer, shape in LAYERS.items() for row in prefill(layer, *shape, options.rank, rate)]
    print("\nPrefill of one expert (goal: 85 % of cuBLAS on merged weights)\n")
    print(table(["layer", "tokens", "us", "of matrix rate", "of cuBLAS on merged weights"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
