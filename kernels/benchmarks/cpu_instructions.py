"""What AVX-512 BF16 is worth to the CPU kernels: the same calls with and without it, on one machine, in turns.

    OMP_NUM_THREADS=1 python kernels/benchmarks/cpu_instructions.py [--model Mistral-7B] [--bits 2] [--rounds 9]

One process computes as the machine can, one as if it had AVX2 alone, kernels and PyTorch alike. They take turns call by
call, and processor time is counted, so that another program on the machine disturbs both, and little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

AVX2 = {
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "",
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
"""What a process is told that is to compute as if the machine had no more."""
EXPERTS = 8
CALLS = ("dense, 1 token", "1 token on 1 expert", "8 dense, 1 token each", "8 tokens on 8 experts")


def worker(model: str, bits: float, rank: int) -> None:
    """Answer each line "layer, call" with its seconds."""
    import torch
    from common import SHAPES, capacity_for, load_experts
    from torch.nn.functional import linear

    from meswitch_kernels import ExpertBank, cpu_vector, expert_linear

    torch.manual_seed(0)
    if os.environ.get("ATEN_CPU_CAPABILITY") == AVX2["ATEN_CPU_CAPABILITY"]:
        # PyTorch asks the processor whether oneDNN multiplies bfloat16, and gives it none without AVX-512.
        torch.backends.mkldnn.set_flags(False)
    told = {"bf16": cpu_vector.HAS_BF16, "torch": torch.backends.cpu.get_cpu_capability()}
    print(json.dumps(told), flush=True)
    made: dict[str, dict[str, Callable[[], object]]] = {}

    def calls(layer: str) -> dict[str, Callable[[], object]]:
        out_features, in_features = SHAPES[model][layer]
        weights = [torch.randn(out_features, in_features).mul(in_features**-0.5).bfloat16() for _ in range(EXPERTS)]
        bank = ExpertBank(EXPERTS, in_features, out_features, capacity_for(bits, salient=8, rank=rank))
        load_experts(bank, EXPERTS, in_features, out_features, bits)
        x = torch.randn(EXPERTS, in_features).bfloat16()
        slots, one = torch.arange(EXPERTS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        functions = (
            lambda: linear(x[:1], weights[0]),
            lambda: expert_linear(x[:1], weights[0], None, bank, one),
            lambda: [linear(x[i : i + 1], weights[i]) for i in range(EXPERTS)],
            lambda: expert_linear(x, weights[0], None, bank, slots),
        )
        return dict(zip(CALLS, functions, strict=True))

    for line in sys.stdin:
        layer, name = json.loads(line)
        if layer not in made:
            made.clear()
            made[layer] = calls(layer)
        call = made[layer][name]
        call()
        repeats, start = 0, time.process_time()
        while time.process_time() - start < 0.03:
            call()
            repeats += 1
        print(json.dumps((time.process_time() - start) / repeats), flush=True)


def main() -> None:
    from common import SHAPES, commit, machine, table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0, help="of every expert's low-rank part")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.bits, options.rank)
        return
    print(f"{machine()}; commit {commit()}; {options.bits} bits, 8 salient, rank {options.rank}")
    rows = []
    for model in options.model or SHAPES:
        command = [sys.executable, __file__, "--worker", model, "--bits", str(options.bits), "--rank"]
        command.append(str(options.rank))
        workers = [
            subprocess.Popen(
                command, env={**os.environ, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for own in ({}, AVX2)
        ]
        told = [json.loads(process.stdout.readline()) for process in workers]
        print(f"{model}: {told[0]} against {told[1]}")
        for layer, (out_features, in_features) in SHAPES[model].items():
            seen: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in CALLS}
            for _ in range(options.rounds):
                for name in CALLS:
                    for process, times in zip(workers, seen[name], strict=True):
                        process.stdin.write(json.dumps([layer, name]) + "\n")
                        process.stdin.flush()
                        times.append(json.loads(process.stdout.readline()))
            dense, one, eight, mixed = (tuple(map(statistics.median, seen[name])) for name in CALLS)
            rows.append(
                [
                    f"{model} {layer} {out_features}x{in_features}",
                    *(f"{first * 1e6:.0f}, {second * 1e6:.0f}" for first, second in (dense, one, mixed)),
                    f"{one[1] / one[0]:.2f}, {mixed[1] / mixed[0]:.2f}",
                    *(f"{ours / theirs:.2f}" for ours, theirs in zip(one, dense, strict=True)),
                    *(f"{ours / theirs:.2f}" for ours, theirs in zip(mixed, eight, strict=True)),
                ]
            )
        for process in workers:
            process.stdin.close()
            process.wait()
    head = ["layer", "dense base, us", "1 token, us", "8 on 8 experts, us", "AVX2 of AVX-512: 1 token, 8 on 8"]
    for what in ("1 token of dense", "8 on 8 of 8 dense"):
        head += [f"{what}, AVX-512", f"{what}, AVX2"]
    print("\nProcessor microseconds with AVX-512 BF16, with AVX2; then ratios\n")
    print(table(head, rows))


if __name__ == "__main__":
    main()
