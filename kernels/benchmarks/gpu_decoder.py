"""One decode step of a whole Mistral-7B-shaped decoder for 16 experts, replayed from a CUDA graph.

    python kernels/benchmarks/gpu_decoder.py [--layers 32] [--tokens 16]

The linears, norms, embedding and head of every layer run on one grouping of the tokens, norms as the engine runs them:
each token with its own expert's gains. Attention over the cache is left out, as it is the same for base and experts.
Beside it the same step of the base alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import commit, graph_seconds, load_experts
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from meswitch_kernels import (
    Capacity,
    ExpertBank,
    GainBank,
    TokenGroups,
    expert_embedding,
    expert_head,
    expert_linear,
    group_tokens,
)
from meswitch_kernels.dispatch import backend_module, default_backend

HIDDEN, INTERMEDIATE, QKV, VOCAB = 4096, 14336, 6144, 32000
BITS, EXPERTS, EPSILON = 2, 16, 1e-5
CAPACITY = Capacity(bits=BITS, salient=8)
PARTS = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}


class Decoder:
    """Random weights and banks of a decoder; distinct memory for every layer, as in a real model."""

    def __init__(self, layers: int) -> None:
        self.weights, self.banks, self.gains = [], [], []
        for _ in range(layers):
            self.weights.append(
                {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.01 for n, s in PARTS.items()}
            )
            self.banks.append({n: ExpertBank(EXPERTS, s[1], s[0], CAPACITY, device="cuda") for n, s in PARTS.items()})
            own = torch.randn(2, HIDDEN, device="cuda", dtype=torch.bfloat16).mul(0.1).add(1)
            self.gains.append([GainBank(EXPERTS, gain) for gain in own])
        self.table = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.vocabulary = ExpertBank(EXPERTS, HIDDEN, VOCAB, CAPACITY, device="cuda")
        load_experts(self.vocabulary, EXPERTS, HIDDEN, VOCAB, BITS)
        for name, (out_features, in_features) in PARTS.items():
            load_experts(self.banks[0][name], EXPERTS, in_features, out_features, BITS)
            for banks in self.banks[1:]:
                for own, first in zip(banks[name].tensors, self.banks[0][name].tensors, strict=True):
                    if isinstance(own, Tensor):
                        own.copy_(first)
        for gains in self.gains:
            for gain in gains:
                for slot in range(EXPERTS):
                    gain.load(slot, gain.table[0] + 0.01 * slot)

    def experts_step(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Logits of one step, every token through its own expert."""
        groups, gain_rows = group_tokens(slots, EXPERTS), slots.long() + 1
        norm = backend_module(default_backend("cuda")).rms_norm
        x = expert_embedding(ids, self.table, self.vocabulary, slots)
        for weights, banks, gains in zip(self.weights, self.banks, self.gains, strict=True):
            x = decoder_layer(
                x,
                partial(expert_product, weights=weights, banks=banks, slots=slots, groups=groups),
                lambda h, which, gains=gains: norm(h, EPSILON, gains[which].table, gain_rows),
            )
        return expert_head(x, self.table, None, self.vocabulary, slots, groups)

    def base_step(self, ids: Tensor) -> Tensor:
        """Logits of one step of the base alone, by cuBLAS."""
        x = self.table[ids]
        for weights, gains in zip(self.weights, self.gains, strict=True):
            x = decoder_layer(
                x,
                lambda h, name, weights=weights: linear(h, weights[name]),
                lambda h, which, gains=gains: rms_norm(h, (HIDDEN,), gains[which].table[0], EPSILON),
            )
        return linear(x, self.table)


def expert_product(
    x: Tensor,
    name: str,
    *,
    weights: dict[str, Tensor],
    banks: dict[str, ExpertBank],
    slots: Tensor,
    groups: TokenGroups,
) -> Tensor:
    """One fused linear of a layer."""
    return expert_linear(x, weights[name], None, banks[name], slots, groups)


def decoder_layer(x: Tensor, product: Callable[[Tensor, str], Tensor], norm: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A layer without its attention over the cache: the query's share of qkv goes straight to o."""
    x = x + product(product(norm(x, 0), "qkv")[:, :HIDDEN], "o")
    gate, up = product(norm(x, 1), "gate_up").chunk(2, -1)
    return x + product(silu(gate) * up, "down")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_decoder needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    decoder = Decoder(options.layers)
    ids = torch.randint(0, VOCAB, (options.tokens,), device="cuda")
    slots = torch.arange(options.tokens, dtype=torch.int32, device="cuda") % EXPERTS
    base = graph_seconds(lambda: decoder.base_step(ids), replays=2)
    experts = graph_seconds(lambda: decoder.experts_step(ids, slots), replays=2)
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; commit {commit()}; {BITS} bits, 8 salient")
    print(
        f"{options.layers} layers, {options.tokens} tokens, {EXPERTS} experts: {experts * 1e3:.2f} ms a step; "
        f"base alone {base * 1e3:.2f} ms; ratio {experts / base:.2f} (16 models: 16)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
