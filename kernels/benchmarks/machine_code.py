"""Instructions that decode's inner loops spend on a weight, read off machine code. Needs no GPU.

    python kernels/benchmarks/machine_code.py [--json] [--quick]

Each loop over blocks of codes is compiled for sm_80 and sm_90 and disassembled. Triton's wheel brings what that takes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
from compile_report import Launch, compiled
from triton.compiler import CompiledKernel

from meswitch_kernels import triton_launch
from meswitch_kernels.messages import FIRST_NUMBER, MESSAGES
from meswitch_kernels.packing import BIT_WIDTHS, PLANE_WORDS, codes_per_word
from meswitch_kernels.triton_messages import message_channels
from meswitch_kernels.tuning import Card, default_settings

QUARTER = FIRST_NUMBER + 4


@dataclass(frozen=True)
class Loop:
    """One pass through decode's inner loop: instructions of a thread, and weights that they unpack and multiply."""

    arch: int
    dtype: str
    bits: float
    code: str
    tile_tokens: int
    weights: int
    instructions: int
    unpacking: int
    """LOP3 and SHF."""
    tensor: int
    """HMMA."""
    shared_loads: int
    shared_stores: int
    copies: int
    """LDGSTS, from device into shared memory."""
    copy_bytes: int
    """Bytes of the widest."""
    registers: int
    shared_cycles: int
    """Of shared memory, for one warp's loads, stores and copies, without conflicts: 128 bytes a cycle."""
    spills: int
    """LDL and STL."""


def launch_of(arch: int, dtype: str, number: int, tile_tokens: int) -> Launch:
    """Decode of a bank whose slots all have codes of one number, by the default settings of a 4096 x 4096 layer."""
    settings = default_settings(4096, 4096, 2 * tile_tokens, Card(f"sm_{arch}", 132, arch == 90))
    constants = {
        "NUMBERS": (number,), "GROUPED": False, "EVEN": True, "HAS_BIAS": False, "BASE_TOKENS": 16,
        "TILE_TOKENS": tile_tokens, "MOST_TILES": 16, "MOST_SPLITS": 16, "BLOCK_OUT": settings.block_out,
        "BLOCK_K": settings.block_k, "Z_SPLITS": 0, "OFFSET_SPLITS": 8, "BLOCK_RANK": 16, "ASM": True,
    }  # fmt: skip
    options = {
        "num_warps": settings.num_warps, "num_stages": settings.num_stages, "maxnreg": triton_launch.MOST_REGISTERS,
    }  # fmt: skip
    return Launch("triton_decode.decode", arch, dtype, constants, options, bits=bits_of(number), tokens=tile_tokens)


def bits_of(number: int) -> float:
    """What is stored of a weight."""
    return number if number < FIRST_NUMBER else 1 / (number - FIRST_NUMBER)


def measure(launch: Launch) -> Loop:
    """The loop of a launch."""
    kernel = compiled(launch)
    body = unpacking_loop(machine_code(kernel))
    kinds = Counter(re.sub(r"^@!?\w+\s+", "", line).split()[0] for line in body)

    def count(*names: str) -> int:
        return sum(number for kind, number in kinds.items() if kind.split(".")[0] in names)

    threads = 32 * launch.options["num_warps"]
    (number,) = launch.constants["NUMBERS"]
    if number > FIRST_NUMBER:
        channels = message_channels(number, launch.tokens)
    else:
        channels = PLANE_WORDS * codes_per_word(number)
    widths = [int(width) // 8 for kind in kinds for width in re.findall(r"LDGSTS\..*?(\d+)$", kind.split(".LTC")[0])]
    return Loop(
        arch=launch.arch,
        dtype=launch.dtype,
        bits=launch.bits,
        code="trellis" if number > FIRST_NUMBER else "scalar",
        tile_tokens=launch.tokens,
        weights=launch.constants["BLOCK_OUT"] * channels // threads,
        instructions=len(body),
        unpacking=count("LOP3", "SHF"),
        tensor=count("HMMA"),
        shared_loads=count("LDS", "LDSM"),
        shared_stores=count("STS", "STSM"),
        copies=count("LDGSTS"),
        copy_bytes=max(widths, default=4),
        registers=registers(kernel),
        spills=count("LDL", "STL"),
        shared_cycles=sum(shared_cycles(kind) * number for kind, number in kinds.items()),
    )


def shared_cycles(kind: str) -> int:
    """Cycles of shared memory that a warp's instruction takes where no two lanes meet in a bank."""
    name, *words = kind.split(".")
    if name == "LDSM" or name == "STSM":
        return int(words[-1])
    if name in ("LDS", "STS", "LDGSTS"):
        width = next((int(word) for word in words if word in ("64", "128")), 32)
        return width // 32
    return 0


def machine_code(kernel: CompiledKernel) -> list[tuple[int, str]]:
    """Address and instruction of each line."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", disassembled(kernel, "-sass"))
    return [(int(address, 16), text) for address, text in lines]


def registers(kernel: CompiledKernel) -> int:
    return int(re.findall(r"REG:(\d+)", disassembled(kernel, "-res-usage"))[0])


def disassembled(kernel: CompiledKernel, option: str) -> str:
    tool = Path(triton.knobs.nvidia.ptxas.path).with_name("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout


def unpacking_loop(code: list[tuple[int, str]]) -> list[str]:
    """The instructions of the innermost loop that multiplies and has the most LOP3.

    Raises:
        ValueError: no loop multiplies.
    """
    loops: list[tuple[int, int, list[str]]] = []
    for address, text in code:
        jump = re.search(r"BRA\S*\s.*?0x([0-9a-f]+)", text)
        if jump and (start := int(jump[1], 16)) <= address:
            body = [line for place, line in code if start <= place <= address]
            if any("HMMA" in line for line in body):
                loops.append((start, address, body))
    innermost = [
        body
        for start, end, body in loops
        if not any((start, end) != (low, high) and start <= low and high <= end for low, high, _ in loops)
    ]
    if not innermost:
        raise ValueError("no loop multiplies")
    return max(innermost, key=lambda body: sum("LOP3" in line for line in body))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="sm_90 and bfloat16 at a few rates alone")
    options = parser.parse_args()
    cases = (
        [(90, "bf16", 2, 8), (90, "bf16", QUARTER, 8), (90, "bf16", 1, 16), (90, "bf16", 2, 16)]
        if options.quick
        else list(product([80, 90], ["bf16", "fp16"], [*BIT_WIDTHS, *MESSAGES], [8, 16]))
    )
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        loops = list(pool.map(measure, [launch_of(*case) for case in cases]))
    if options.json:
        print(json.dumps([asdict(loop) for loop in loops]))
        return 0
    print(
        "| arch | type | bits | code | tile | instructions a weight | unpacking | tensor | shared loads "
        "| shared stores | copies | bytes | registers |"
    )
    print("|" + "---|" * 13)
    for loop in loops:
        print(
            f"| sm_{loop.arch} | {loop.dtype} | {loop.bits:g} | {loop.code} | {loop.tile_tokens} "
            f"| {loop.instructions / loop.weights:.2f} | {loop.unpacking / loop.weights:.2f} "
            f"| {loop.tensor / loop.weights:.2f} | {loop.shared_loads / loop.weights:.2f} | {loop.shared_stores} "
            f"| {loop.copies} | {loop.copy_bytes} | {loop.registers} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
