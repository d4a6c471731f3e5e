"""Compile the Triton kernels ahead of time and report registers, spills and shared memory. Needs no GPU.

    python kernels/benchmarks/compile_report.py [--json] [--quick]

Every launch that the default settings can make is compiled for sm_80 and sm_90; exit status 1 where one spills.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from meswitch_kernels import (
    triton_decode,
    triton_groups,
    triton_low_rank,
    triton_norm,
    triton_ops,
    triton_prefill,
    triton_rows,
)
from meswitch_kernels.groups import tile_size_for
from meswitch_kernels.packing import widths_in
from meswitch_kernels.tuning import Card, default_settings

POINTERS = {
    "ids": "i64",
    "partials": "fp32",
    "steps": "fp32",
    "bias_delta": "fp32",
    "channel_scale": "fp16",
    "table": "fp32",
    "gain_rows": "i64",
    "z": "fp32",
}
VALUES = {"x", "weight", "y", "bias", "salient_value", "left", "right", "added_rows"}
INTEGER_POINTERS = {
    "codes", "salient_index", "slot_bits", "slot_group", "slot_rank", "slot_of_token", "order", "tile_slot",
    "tile_start", "tile_count", "added_counts",
}  # fmt: skip
MULTIPLES_OF_16 = {
    "in_features", "out_features", "hidden", "x_stride", "weight_stride", "codes_stride", "steps_stride",
    "channels_per_split", "max_salient", "max_rank",
}  # fmt: skip
RANK = 32
"""Room for a low-rank part, beside none. Any multiple of 16 compiles to the same."""


@dataclass(frozen=True)
class Row:
    """What one compiled kernel uses."""

    kernel: str
    arch: int
    dtype: str
    bits: int
    steps: str
    rank: int
    tokens: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def signature(
    kernel: object, dtype: str, constants: dict[str, object]
) -> tuple[dict[str, str], dict[tuple[int], list]]:
    """Types of a kernel's arguments by name, and which are multiples of 16."""
    types, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        if name in VALUES or name in POINTERS or name in INTEGER_POINTERS:
            types[name] = "*" + (dtype if name in VALUES else POINTERS.get(name, "i32"))
        else:
            types[name] = "fp32" if name == "epsilon" else "i32"
        if types[name][0] == "*" or name in MULTIPLES_OF_16:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, attributes


def measure(
    kernel: object, dtype: str, arch: int, constants: dict[str, object], options: dict[str, int]
) -> tuple[int, int, int]:
    """(registers, spilled bytes, shared bytes) of a kernel compiled for sm_`arch`."""
    types, attributes = signature(kernel, dtype, constants)
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(ptx), "-o", f"{folder}/out"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return registers, spilled, compiled.metadata.shared


def rows(quick: bool) -> Iterator[Row]:
    """Compile and report, one launch at a time."""
    formats = [("bf16", 2)] if quick else [("bf16", 1), ("bf16", 2), ("bf16", 4), ("fp16", 2), ("fp32", 2)]
    for arch, (dtype, bits), grouped, rank in product([80, 90], formats, [False, True], [0, RANK]):
        card = Card(f"sm_{arch}", 108 if arch == 80 else 132, arch == 90)
        common = {"WIDTHS": widths_in(bits), "GROUPED": grouped, "BLOCK_RANK": triton_ops.RANK_BLOCK}
        steps = "grouped" if grouped else "per row"
        for tokens in (16,) if quick else (16, 32, 64):
            settings = default_settings("decode", 4096, 4096, tokens, card, dtype == "fp32")
            constants = {
                **common, "BASE_TOKENS": tokens, "TILE_TOKENS": 16, "BLOCK_OUT": settings.block_out,
                "BLOCK_K": settings.block_k, "DELTA_BLOCK_K": settings.delta_block_k,
                "Z_SPLITS": triton_ops.PROJECT_SPLITS if rank else 0,
            }  # fmt: skip
            options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
            used = measure(triton_decode.decode_partials, dtype, arch, constants, options)
            yield Row("decode_partials", arch, dtype, bits, steps, rank, tokens, *used)
        for tokens in (128, 1024):
            settings = default_settings("prefill", 4096, 4096, tokens, card, dtype == "fp32")
            constants = {
                **common, "HAS_BIAS": True, "TILE_TOKENS": tile_size_for(tokens), "BLOCK_OUT": settings.block_out,
                "BLOCK_K": settings.block_k, "TILES_TOGETHER": 8, "Z_SPLITS": 1 if rank else 0,
            }  # fmt: skip
            options = {"num_warps": settings.num_warps, "num_stages": settings.num_stages}
            used = measure(triton_prefill.prefill, dtype, arch, constants, options)
            yield Row("prefill", arch, dtype, bits, steps, rank, tokens, *used)
    for arch, dtype, tokens in product([80, 90], ["bf16"] if quick else ["bf16", "fp16", "fp32"], [16, 128, 1024]):
        tile = tile_size_for(tokens)
        constants = {
            "TILE_TOKENS": tile, "BLOCK_RANK": triton_ops.RANK_BLOCK, "BLOCK_K": triton_ops.project_block(tile),
        }  # fmt: skip
        used = measure(triton_low_rank.project, dtype, arch, constants, triton_ops.PROJECT_OPTIONS)
        yield Row("project", arch, dtype, 0, "-", RANK, tokens, *used)
    rows_alone = [
        (triton_decode.reduce_partials, {"HAS_BIAS": True, "BLOCK": 256}),
        (triton_rows.embedding_rows, {"BLOCK": 1024}),
        (triton_norm.norm_rows, {"OWN": True, "ROWS": 1, "BLOCK": 4096}),
        (triton_norm.norm_rows, {"OWN": False, "ROWS": 8, "BLOCK": 128}),
        (triton_groups.group_by_slot, {"TILE_TOKENS": 16, "GROUPS": 32, "TOKENS": 64, "TILES": 64}),
        (triton_groups.group_by_slot, {"TILE_TOKENS": 16, "GROUPS": 256, "TOKENS": 64, "TILES": 16}),
        (triton_rows.added_row_logits, {"BLOCK": 1024}),
    ]
    for arch, (kernel, constants) in product([80, 90], rows_alone):
        used = measure(kernel, "bf16", arch, constants, {"num_warps": 4})
        yield Row(kernel.__name__, arch, "bf16", 0, "-", 0, 0, *used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="the launches of bfloat16 serving alone")
    options = parser.parse_args()
    found = list(rows(options.quick))
    if options.json:
        print(json.dumps([asdict(row) for row in found]))
    else:
        print(f"triton {triton.__version__}\n")
        print("| kernel | arch | dtype | bits | steps | rank | tokens | registers | spilled bytes | shared bytes |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in found:
            bits, tokens = row.bits or "any", row.tokens or "any"
            print(
                f"| {row.kernel} | sm_{row.arch} | {row.dtype} | {bits} | {row.steps} | {row.rank} | {tokens} "
                f"| {row.registers} | {row.spilled_bytes} | {row.shared_bytes} |"
            )
    return int(any(row.spilled_bytes for row in found))


if __name__ == "__main__":
    sys.exit(main())
