"""Measure launch settings on this card and write them to `tuning.json`.

    python kernels/benchmarks/tune.py [--write]

Without --write it prints the table. Each entry names the best of the candidates at one shape and token bucket.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from common import SHAPES, graph_seconds, load_experts

from meswitch_kernels import Capacity, ExpertBank, expert_linear, group_tokens, triton_ops, tuning
from meswitch_kernels.groups import tile_size_for
from meswitch_kernels.tuning import LaunchSettings, launch_settings, token_bucket

SLOTS = 4
CANDIDATES = {
    "decode": [
        LaunchSettings(block_out, block_k, splits, warps, stages, delta)
        for block_out, block_k, splits, warps, stages, delta in product(
            (32, 64, 128), (64, 128), (1, 2, 4, 8), (4, 8), (3, 4), (128, 256)
        )
    ],
    "prefill": [
        LaunchSettings(block_out, block_k, 1, warps, stages)
        for block_out, block_k, warps, stages in product((64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
    ],
}


def best(kernel: str, out_features: int, in_features: int, tokens: int) -> LaunchSettings:
    """The fastest candidate; those that do not fit the card are passed over."""
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    bank = ExpertBank(SLOTS, in_features, out_features, Capacity(bits=2, salient=8), device="cuda")
    load_experts(bank, SLOTS, in_features, out_features, 2)
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(tokens, dtype=torch.int32, device="cuda") % SLOTS
    groups = group_tokens(slots, SLOTS)
    winner = launch_settings(kernel, out_features, in_features, tokens, x.dtype, x.device)
    fastest = float("inf")
    for candidate in [winner, *CANDIDATES[kernel]]:
        triton_ops.launch_settings = lambda *_, chosen=candidate: chosen
        try:
            seconds = graph_seconds(lambda: expert_linear(x, weight, None, bank, slots, groups), replays=10, repeats=3)
        except Exception as error:  # a candidate may exceed the card's shared memory; that is not a failure
            print(f"{candidate}: {type(error).__name__}", file=sys.stderr)
            continue
        if seconds < fastest:
            winner, fastest = candidate, seconds
    triton_ops.launch_settings = launch_settings
    return winner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the result into the package's tuning.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune needs a CUDA device", file=sys.stderr)
        return 1
    found = {}
    for out_features, in_features in SHAPES["Mistral-7B"].values():
        for kernel, tokens in (("decode", 16), ("decode", 64), ("prefill", 512), ("prefill", 4096)):
            key = f"{kernel}/{out_features}x{in_features}/{tile_size_for(tokens)}/{token_bucket(tokens)}"
            found[key] = asdict(best(kernel, out_features, in_features, tokens))
            print(key, found[key])
    path = Path(tuning.__file__).with_name("tuning.json")
    if options.write:
        content = json.loads(path.read_text())
        content["cards"][torch.cuda.get_device_name()] = found
        path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
