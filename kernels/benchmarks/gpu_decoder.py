"""One decode step of a whole Mistral-7B-shaped decoder for many experts, replayed from a CUDA graph.

    python kernels/benchmarks/gpu_decoder.py [--layers 32] [--bits 2 --rank 0 --experts 16 --tokens 16]

Linears, norms, embedding and head of every layer run on one grouping of the tokens, as the engine runs them: q, k and v
together, gate and up together, each token with its own expert's gains. Experts of 1 bit have channel scales, as
`meswitch compress` makes them. Attention over the cache is left out, as it is the same for base and experts. Beside it
the same step of the base alone, its linears and head through cuBLAS. Prints one line of JSON a row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from common import capacity_for, delta_bytes, graph_seconds, load_experts, parse_bits, say, scaled_at
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from meswitch_kernels import (
    Capacity,
    ExpertBank,
    GainBank,
    expert_embedding,
    expert_head,
    group_tokens,
)
from meswitch_kernels.dispatch import backend_module, default_backend

HIDDEN, INTERMEDIATE, KEYS, VOCAB = 4096, 14336, 1024, 32000
EPSILON = 1e-5
PARTS = {
    "q": (HIDDEN, HIDDEN),
    "k": (KEYS, HIDDEN),
    "v": (KEYS, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INTERMEDIATE, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
#: (bits, rank, slots) and the batches of each as (experts, tokens); embedding and head are at 2 bits at least.
RUNS = (
    ((2, 0, 16), ((1, 1), (1, 16), (4, 16), (16, 16))),
    ((1, 16, 16), ((1, 1), (1, 16), (4, 16), (16, 16))),
    ((0.25, 16, 16), ((1, 1), (1, 16), (4, 16), (16, 16))),
    ((1, 16, 48), ((48, 48),)),
    ((0.25, 16, 48), ((48, 48),)),
)


class Decoder:
    """Random weights and banks of a decoder; distinct memory for every layer, as in a real model."""

    def __init__(self, layers: int) -> None:
        self.weights = [
            {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.01 for n, s in PARTS.items()}
            for _ in range(layers)
        ]
        self.table = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.plain = torch.randn(2, HIDDEN, device="cuda", dtype=torch.bfloat16).mul(0.1).add(1)
        self.banks: list[dict[str, ExpertBank]] = []
        self.gains: list[list[GainBank]] = []

    def load(self, bits: float, rank: int, experts: int) -> None:
        """Fill banks of this format; those of before are let go."""
        self.banks, self.gains, self.slots = [], [], experts
        scaled = scaled_at(bits)
        capacity = capacity_for(bits, salient=8, rank=rank, channel_scale=scaled)
        for _ in self.weights:
            self.banks.append({n: ExpertBank(experts, s[1], s[0], capacity, device="cuda") for n, s in PARTS.items()})
            self.gains.append([GainBank(experts, gain) for gain in self.plain])
        self.vocabulary = ExpertBank(experts, HIDDEN, VOCAB, Capacity(bits=max(2, bits), salient=8), device="cuda")
        load_experts(self.vocabulary, experts, HIDDEN, VOCAB, max(2, bits))
        for name, (out_features, in_features) in PARTS.items():
            load_experts(self.banks[0][name], experts, in_features, out_features, bits, scaled)
            for banks in self.banks[1:]:
                for own, first in zip(banks[name].tensors, self.banks[0][name].tensors, strict=True):
                    if isinstance(own, Tensor):
                        own.copy_(first)
        for gains in self.gains:
            for gain in gains:
                for slot in range(experts):
                    gain.load(slot, gain.table[0] + 0.01 * slot)

    def experts_step(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Logits of one step, every token through its own expert."""
        backend = backend_module(default_backend("cuda"))
        groups, gain_rows = group_tokens(slots, self.slots), slots.long() + 1
        x = expert_embedding(ids, self.table, self.vocabulary, slots)
        for weights, banks, gains in zip(self.weights, self.banks, self.gains, strict=True):

            def products(
                h: Tensor, names: str, weights: dict[str, Tensor] = weights, banks: dict[str, ExpertBank] = banks
            ) -> list[Tensor]:
                operands = [(weights[name], None, banks[name].tensors) for name in names.split()]
                if len(operands) == 1:
                    return [backend.expert_linear(h, *operands[0], slots, groups)]
                return backend.expert_linears(h, operands, slots, groups)

            x = decoder_layer(
                x, products, lambda h, which, gains=gains: backend.rms_norm(h, EPSILON, gains[which].table, gain_rows)
            )
        return expert_head(x, self.table, None, self.vocabulary, slots, groups)

    def base_step(self, ids: Tensor) -> Tensor:
        """Logits of one step of the base alone, by cuBLAS."""
        x = self.table[ids]
        for weights in self.weights:
            x = decoder_layer(
                x,
                lambda h, names, weights=weights: [linear(h, weights[name]) for name in names.split()],
                lambda h, which: rms_norm(h, (HIDDEN,), self.plain[which], EPSILON),
            )
        return linear(x, self.table)

    @property
    def base_nbytes(self) -> int:
        """Bytes that a step must read of the base: linears and head."""
        return sum(w.nbytes for weights in self.weights for w in weights.values()) + self.table.nbytes

    def delta_nbytes(self, bits: float, rank: int) -> int:
        """Bytes that a step must read of one expert."""
        layer = sum(delta_bytes(i, o, bits, rank=rank) for o, i in PARTS.values())
        return len(self.weights) * layer + delta_bytes(HIDDEN, VOCAB, max(2, bits))


def decoder_layer(
    x: Tensor, products: Callable[[Tensor, str], list[Tensor]], norm: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """A layer without its attention over the cache: the query goes straight to o, keys and values nowhere."""
    query, _, _ = products(norm(x, 0), "q k v")
    x = x + products(query, "o")[0]
    gate, up = products(norm(x, 1), "gate up")
    return x + products(silu(gate) * up, "down")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=parse_bits, help="of every expert's codes; without it five formats in turn")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_decoder needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    decoder = Decoder(options.layers)
    chosen = ((options.bits, options.rank, options.experts), ((options.experts, options.tokens),))
    for (bits, rank, slots), batches in [chosen] if options.bits else RUNS:
        decoder.load(bits, rank, slots)
        for experts, tokens in batches:
            ids = torch.randint(0, VOCAB, (tokens,), device="cuda")
            slot_of_token = torch.arange(tokens, dtype=torch.int32, device="cuda") % experts
            base = graph_seconds(lambda ids=ids: decoder.base_step(ids), replays=2)
            ours = graph_seconds(lambda i=ids, s=slot_of_token: decoder.experts_step(i, s), replays=2)
            delta_nbytes = min(experts, tokens) * decoder.delta_nbytes(bits, rank)
            moved = decoder.base_nbytes + delta_nbytes
            say(
                "decoder",
                layers=options.layers,
                bits=bits,
                rank=rank,
                slots=slots,
                experts=experts,
                tokens=tokens,
                ms=ours * 1e3,
                base_ms=base * 1e3,
                times_base=ours / base,
                base_gb=decoder.base_nbytes / 1e9,
                delta_gb=delta_nbytes / 1e9,
                delta_head_gb=min(experts, tokens) * delta_bytes(HIDDEN, VOCAB, max(2, bits)) / 1e9,
                gb_per_s=moved / ours / 1e9,
                allocated_gb=torch.cuda.memory_allocated() / 1e9,
            )
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
