"""Compile the Triton kernels ahead of time and report registers, spills and shared memory. Needs no GPU.

    python kernels/benchmarks/compile_report.py [--json] [--quick]

Every launch that the default settings can make is compiled for sm_80 and sm_90. Exit status 1 where one spills, but for
the few numbers that decode may hold in memory beside tiles of 16 tokens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from meswitch_kernels import triton_formats, triton_groups, triton_launch, triton_merge, triton_norm
from meswitch_kernels.bank import bank_formats
from meswitch_kernels.groups import tile_size_for
from meswitch_kernels.messages import FIRST_NUMBER, MESSAGES
from meswitch_kernels.packing import BIT_WIDTHS
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
    "offsets": "fp32",
    "linears": "i64",
    "maxima": "fp32",
    "sums": "fp32",
}
FLOATS = {"epsilon", "scale", "softcap"}
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VALUES = {
    "x", "scaled", "weight", "y", "bias", "salient_value", "left", "right", "added_rows", "merged", "shift", "like",
    "residual", "query", "key", "value", "new_query", "new_key", "key_cache", "value_cache", "out", "cos", "sin",
    "gate", "up",
}  # fmt: skip
INTEGER_POINTERS = {
    "codes", "salient_index", "slot_bits", "slot_group", "slot_rank", "slot_of_token", "order", "tile_slot",
    "tile_start", "tile_count", "added_counts", "tickets", "source",
    "target", "tables", "positions", "chosen", "prompts",
}  # fmt: skip
MULTIPLES_OF_16 = {
    "in_features", "out_features", "hidden", "x_stride", "scaled_stride", "weight_stride", "codes_stride",
    "steps_stride", "channels_per_split", "max_rank", "most_rank", "width", "query_head", "query_token", "key_head",
    "key_token", "value_head", "value_token", "cache_row", "cache_head",
}  # fmt: skip
ALONE = {
    "triton_rows.embedding_rows": {"NUMBERS": bank_formats(2, list(MESSAGES)), "BLOCK": 1024},
    "triton_norm.norm_rows": {"OWN": True, **triton_norm.norm_launch(4096)},
    "triton_merge.merge_siblings": {
        "NUMBERS": (2, 1),
        "GROUPED": False,
        "SCALED": True,
        "EVEN": True,
        "HAS_BIAS": False,
        "LOW_RANK": True,
        **triton_merge.merge_launch(torch.bfloat16, 16),
    },
    "triton_groups.group_by_slot": {"TILE_TOKENS": 16, **triton_groups.group_launch(255)},
    "triton_siblings.prepare_siblings": {
        "SPLITS": 8,
        "SCALED": True,
        "PLACED": True,
        "MESSAGES": tuple(MESSAGES),
        "RANKED": True,
        "TILE_TOKENS": 8,
        "BLOCK_RANK": 16,
        "BLOCK_K": 128,
    },
    "triton_elementwise.turn_heads": {"HEADS": 8, "HALF": 64},
    "triton_elementwise.gate_rows": {"BLOCK": 1024},
    "triton_rows.added_row_logits": {"BLOCK": 1024},
    "triton_attention.decode_pages": {
        "SHARED": 4,
        "ROWS": 16,
        "WIDTH": 128,
        "PAGE": 64,
        "KEYS": 64,
        "SPLITS": 4,
        "WINDOWED": False,
        "CAPPED": False,
        "GATHERED": False,
    },
    "triton_prompts.prompt_pages": {
        "SHARED": 4,
        "PADDED": 4,
        "QUERIES": 32,
        "WIDTH": 128,
        "PAGE": 64,
        "KEYS": 64,
        "WINDOWED": False,
        "CAPPED": False,
        "num_warps": 8,
        "num_stages": 2,
    },
    "triton_prompts.write_prompts": {"TOKENS": 16, "WIDTH": 128, "PAGE": 64, "WINDOWED": False},
}
"""Kernels that do not depend on the kind of a bank, with their constants and options."""
OPTIONS = {"num_warps", "num_stages"}
WIDE_TILE_SPILLS = 28
"""Bytes that decode may spill beside tiles of 16, once a tile (docs/results/kernels-compile.md)."""
RANK = 32
"""Room for a low-rank part, beside none. Any multiple of 16 compiles to the same."""


@dataclass(frozen=True)
class Launch:
    """One way a kernel is compiled: `kernel` is its module and name, `tokens` the batch that takes it, 0 for any."""

    kernel: str
    arch: int
    dtype: str
    constants: dict[str, object]
    options: dict[str, int]
    bits: float = 0
    steps: str = "-"
    rank: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Row:
    """What one compiled kernel uses."""

    kernel: str
    arch: int
    dtype: str
    bits: float
    steps: str
    rank: int
    tokens: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def spills(self) -> bool:
        """Whether it spills more than it may."""
        wide = self.kernel.startswith("decode") and self.tokens > 0 and tile_size_for(self.tokens) > 8
        return self.spilled_bytes > (WIDE_TILE_SPILLS if wide else 0)


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
            types[name] = "fp32" if name in FLOATS else "i32"
        if types[name][0] == "*" or name in MULTIPLES_OF_16:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return types, attributes


def compiled(launch: Launch) -> CompiledKernel:
    """A launch, compiled for its card."""
    module, name = launch.kernel.split(".")
    kernel = getattr(importlib.import_module(f"meswitch_kernels.{module}"), name)
    types, attributes = signature(kernel, launch.dtype, launch.constants)
    source = ASTSource(kernel, signature=types, constexprs=launch.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)


def measure(launch: Launch) -> Row:
    """Registers, spilled bytes and shared bytes of one launch."""
    kernel = compiled(launch)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])[1]
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(ptx), "-o", f"{folder}/out"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    shape = (launch.arch, launch.dtype, launch.bits, launch.steps, launch.rank, launch.tokens)
    return Row(launch.kernel.split(".")[1], *shape, registers, spilled, kernel.metadata.shared)


def launches(quick: bool) -> Iterator[Launch]:
    """Every launch that the default settings can make."""
    scalar = [("bf16", 2)] if quick else [("bf16", 1), ("bf16", 2), ("bf16", 4), ("fp16", 2), ("fp32", 2)]
    formats = [(dtype, bits, bank_formats(bits, ())) for dtype, bits in scalar]
    # A bank of several codes has a launch for the scalar ones and for each message.
    short = [next(reversed(MESSAGES))] if quick else list(MESSAGES)
    each = product(["bf16"] if quick else TYPES, triton_formats.families(short))
    formats += [(dtype, 1 / (family[0] - FIRST_NUMBER), family) for dtype, family in each]
    for arch, (dtype, bits, numbers), grouped, rank in product([80, 90], formats, [False, True], [0, RANK]):
        if grouped and numbers[0] > FIRST_NUMBER:
            continue
        card = Card(f"sm_{arch}", 108 if arch == 80 else 132, arch == 90)
        common = {
            "NUMBERS": numbers, "GROUPED": grouped, "EVEN": True, "BLOCK_RANK": triton_launch.rank_block(rank),
        }  # fmt: skip
        kind = {"bits": bits, "steps": "grouped" if grouped else "per row", "rank": rank}
        alike = grouped or numbers[0] > FIRST_NUMBER
        for tokens in ((16,) if alike else (16, 32)) if quick else (16, 32, 64):
            settings = default_settings(4096, 4096, tokens, card, dtype == "fp32", grouped)
            constants = {
                **common, "HAS_BIAS": True, "ASM": True, "BASE_TOKENS": tokens, "TILE_TOKENS": tile_size_for(tokens),
                "MOST_TILES": tokens, "MOST_SPLITS": 16, "BLOCK_OUT": settings.block_out, "BLOCK_K": settings.block_k,
                "Z_SPLITS": triton_launch.PREPARE_SPLITS if rank else 0,
                "OFFSET_SPLITS": 0 if grouped or dtype == "fp32" else triton_launch.PREPARE_SPLITS,
            }  # fmt: skip
            options = {
                "num_warps": settings.num_warps, "num_stages": settings.num_stages,
                "maxnreg": triton_launch.MOST_REGISTERS,
            }  # fmt: skip
            yield Launch("triton_decode.decode", arch, dtype, constants, options, **kind, tokens=tokens)
            if (dtype, bits, tokens, grouped) == ("bf16", 2, 16, False):
                # Decode's own code but for the pointers: one for each card will do.
                yield Launch("triton_siblings.decode_siblings", arch, dtype, constants, options, **kind, tokens=tokens)
        options = triton_merge.merge_launch(TYPES[dtype], rank)
        constants = {
            **{name: common[name] for name in ("NUMBERS", "GROUPED", "EVEN")}, "SCALED": bits == 1, "HAS_BIAS": True,
            "LOW_RANK": rank > 0, **options,
        }  # fmt: skip
        options = {"num_warps": constants.pop("num_warps")}
        yield Launch("triton_merge.merge_rows", arch, dtype, constants, options, **kind)
    for arch, dtype, tokens in product([80, 90], ["bf16"] if quick else ["bf16", "fp16", "fp32"], [16, 64]):
        tile = tile_size_for(tokens)
        constants = {
            "SCALED": True, "PLACED": True, "MESSAGES": tuple(MESSAGES), "RANKED": True, "TILE_TOKENS": tile,
            "BLOCK_RANK": triton_launch.rank_block(RANK), "BLOCK_K": triton_launch.PREPARE_BLOCK,
        }  # fmt: skip
        options = triton_launch.PREPARE_OPTIONS
        yield Launch("triton_low_rank.prepare", arch, dtype, constants, options, rank=RANK, tokens=tokens)
    for arch, bits in product([80, 90], BIT_WIDTHS):
        constants = {"BITS": bits, "BLOCK_ROWS": 16}
        yield Launch("triton_planes.rearrange_codes", arch, "bf16", constants, {"num_warps": 4}, bits=bits)
    for arch, (kernel, constants) in product([80, 90], ALONE.items()):
        options = {"num_warps": 4} | {name: value for name, value in constants.items() if name in OPTIONS}
        own = {name: value for name, value in constants.items() if name not in OPTIONS}
        yield Launch(kernel, arch, "bf16", own, options)


def compile_all(quick: bool) -> list[Row]:
    """Compile and report, as many launches at once as there are processors."""
    # A fresh interpreter each: Triton's compiler is not made for a forked copy of a process that has used it.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, launches(quick)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="the launches of bfloat16 serving alone")
    options = parser.parse_args()
    found = compile_all(options.quick)
    if options.json:
        print(json.dumps([asdict(row) for row in found]))
    else:
        print(f"triton {triton.__version__}\n")
        print("| kernel | arch | dtype | bits | steps | rank | tokens | registers | spilled bytes | shared bytes |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for row in found:
            bits, tokens = f"{row.bits:g}" if row.bits else "any", row.tokens or "any"
            print(
                f"| {row.kernel} | sm_{row.arch} | {row.dtype} | {bits} | {row.steps} | {row.rank} | {tokens} "
                f"| {row.registers} | {row.spilled_bytes} | {row.shared_bytes} |"
            )
    return int(any(row.spills for row in found))


if __name__ == "__main__":
    sys.exit(main())
