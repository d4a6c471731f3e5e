"""Bytes of an update that is kept bit for bit, against zstd. Writes docs/results/exact.md.

    python tests bench exact [--size 2048] [--real NAME BASE EXPERT]

Needs the package zstandard beside the others. With --real the rows of a fine-tune of two checkpoint folders are
measured too; without it those that the page has stay. Synthetic weights are Gaussian, bf16; an update is Gaussian on
top of them, rounded to bf16 as training from fp32 weights leaves it, its size chosen so that the share of weights
changes; or it moves weights by one rounding step at random places, whatever their size.
"""

from __future__ import annotations

import argparse
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import zstandard

from benchmarks.machine import describe
from meswitch_cli.checkpoint.weight_files import SINGLE_FILE
from meswitch_cli.delta import exact

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "exact.md"
REAL = "## Real fine-tunes\n\n"
REAL_INTRO = (
    "Whole checkpoints, bf16, tensor by tensor. `reinforced` is of the zoo's second group (`python tests zoo`): 80 "
    "steps at a rate of 5e-6 on SmolLM2-135M-Instruct, by which each weight moves less than a bf16 step of most "
    "weights, as reinforcement learning leaves them; its loss is a supervised one."
)
SHARES = (0.01, 0.05, 0.1, 0.3)
WEIGHT = 0.02
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
CODERS: dict[str, Callable[[bytes], bytes]] = {
    "Huffman alone (as stored)": exact._deflated,
    "deflate 9": lambda data: zlib.compress(data, 9),
    "LZMA": lambda data: lzma.compress(data, format=lzma.FORMAT_RAW, filters=_LZMA),
    "zstd 19": lambda data: zstandard.compress(data, 19),
}


def base_weights(size: int) -> torch.Tensor:
    return (WEIGHT * torch.randn(size, size, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)


def trained(base: torch.Tensor, share: float) -> torch.Tensor:
    """An update whose size makes this share of the weights change, found by bisection."""
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
    low, high = 1e-9, 1e-2
    for _ in range(40):
        middle = (low * high) ** 0.5
        moved = float(((base.float() + middle * noise).to(torch.bfloat16) != base).float().mean())
        low, high = (middle, high) if moved < share else (low, middle)
    return (base.float() + low * noise).to(torch.bfloat16)


def at_random(base: torch.Tensor, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    moved = torch.rand(base.shape, generator=generator) < share
    sign = torch.randint(0, 2, base.shape, generator=generator, dtype=torch.int16) * 2 - 1
    bits = base.view(torch.int16)
    return torch.where(moved, bits + sign, bits).view(torch.bfloat16)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.int16).numpy().tobytes()


def real_row(name: str, base_folder: str, expert_folder: str) -> str:
    """The row of a fine-tune of one file of bf16 weights, tensor by tensor as `compress --exact` goes."""
    files = (Path(folder).expanduser() / SINGLE_FILE for folder in (base_folder, expert_folder))
    base, expert = (safetensors.torch.load_file(file) for file in files)
    stored, moved, count = 0, 0, 0
    both = [(base[key], expert[key]) for key in expert]
    for before, after in both:
        count += after.numel()
        if changed := int((before != after).sum()):
            stream = exact.encode(before, after)
            assert torch.equal(exact.decode(stream, before).view(torch.int16), after.view(torch.int16))
            stored, moved = stored + len(stream), moved + changed
    xors = (before.view(torch.int16) ^ after.view(torch.int16) for before, after in both)
    difference = b"".join(item.numpy().tobytes() for item in xors)
    others = [zstandard.compress(difference, level) for level in (3, 19)]
    others.append(zstandard.compress(b"".join(raw(after) for _, after in both), 19))
    cells = [f"{size / count:.4f}" for size in (stored, *map(len, others))]
    return f"| {name} | {moved / count:.2%} | {' | '.join(cells)} | {8 * stored / count:.2f} |"


def rows_of_page() -> list[str]:
    """The rows of real fine-tunes that the page has."""
    part = RESULTS.read_text().partition(REAL)[2].partition("\n## ")[0]
    return re.findall(r"^\| .*[0-9] \|$", part, re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--real", nargs=3, action="append", default=[], metavar=("NAME", "BASE", "EXPERT"))
    arguments = parser.parse_args()
    base = base_weights(arguments.size)
    count = base.numel()
    sizes, coders = [], []
    for label, make in (("trained", trained), ("random places", at_random)):
        for share in SHARES:
            expert = make(base, share)
            stream = exact.encode(base, expert)
            assert torch.equal(exact.decode(stream, base).view(torch.int16), expert.view(torch.int16))
            difference = (base.view(torch.int16) ^ expert.view(torch.int16)).numpy().tobytes()
            moved = float((base != expert).float().mean())
            others = [zstandard.compress(data, level) for data, level in ((difference, 3), (difference, 19))]
            others.append(zstandard.compress(raw(expert), 19))
            cells = [f"{len(data) / count:.4f}" for data in (stream, *others)]
            sizes.append(f"| {label} | {moved:.1%} | {' | '.join(cells)} | {8 * len(stream) / count:.2f} |")
            streams = [part.tobytes() for part in exact._parts(stream, count)[1:]]
            row = []
            for coder in CODERS.values():
                row.append(f"{sum(len(coder(part)) for part in streams) / count:.4f}")
            coders.append(f"| {label} | {moved:.1%} | {' | '.join(row)} |")
            print(sizes[-1], coders[-1], sep="\n", flush=True)
    fresh = [real_row(*given) for given in arguments.real]
    names = {row.split(" | ")[0] for row in fresh}
    reals = [row for row in rows_of_page() if row.split(" | ")[0] not in names] + fresh
    print(*reals, sep="\n")
    heads = " | ".join(CODERS)
    columns = (
        "weights moved | `--exact` | zstd 3 of the xor | zstd 19 of the xor | zstd 19 of the expert | "
        "`--exact`, bits a weight |\n|---|---|---|---|---|---|---|\n"
    )
    RESULTS.write_text(
        "# Exact updates\n\n"
        "Bytes a weight of `compress --exact`, which restores the expert bit for bit. 2 bytes a weight is the expert "
        f"itself. Weights: Gaussian, bf16, {arguments.size} x {arguments.size}. Trained: a Gaussian update rounded to "
        "bf16, which moves small weights more often than large ones. Random places: one rounding step up or down, "
        "whatever the weight.\n\n"
        f"`python tests bench exact --size {arguments.size}`, {describe()}.\n\n"
        f"| update | {columns}" + "\n".join(sizes) + "\n\n"
        f"{REAL}{REAL_INTRO}\n\n| fine-tune | {columns}" + "\n".join(reals) + "\n\n"
        "## How to read this\n\n"
        "Weights are taken by the exponent of the base's, so that small ones, which change often, do not lie among "
        "large ones, which seldom do. That is what wins on a trained update. At random places there is nothing to "
        "know, and the size is near the entropy of the places and one bit for each sign.\n\n"
        "## The coder of the streams\n\n"
        "Bytes a weight of the same gaps, signs and sizes by other coders. Huffman codes alone are the choice: LZMA, "
        "whose coder learns from one byte to the next, takes 5 to 13 % less on trained updates, and has to be unpacked "
        "byte by byte when an expert is loaded.\n\n"
        f"| update | weights moved | {heads} |\n|---|---|{'---|' * len(CODERS)}\n" + "\n".join(coders) + "\n"
    )


if __name__ == "__main__":
    main()
