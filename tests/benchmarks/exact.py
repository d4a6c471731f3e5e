"""Bytes of an update that is kept bit for bit, against zstd. Writes docs/results/exact.md.

    python tests bench exact [--size 2048]

Needs the package zstandard beside the others. Weights are Gaussian, bf16; an update is Gaussian on top of them,
rounded to bf16 as training from fp32 weights leaves it, its size chosen so that the share of weights changes; or it
moves weights by one rounding step at random places, whatever their size.
"""

from __future__ import annotations

import argparse
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import zstandard

from benchmarks.machine import describe
from meswitch_cli.delta import exact

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "exact.md"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
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
    heads = " | ".join(CODERS)
    RESULTS.write_text(
        "# Exact updates\n\n"
        "Bytes a weight of `compress --exact`, which restores the expert bit for bit. 2 bytes a weight is the expert "
        f"itself. Weights: Gaussian, bf16, {arguments.size} x {arguments.size}. Trained: a Gaussian update rounded to "
        "bf16, which moves small weights more often than large ones. Random places: one rounding step up or down, "
        "whatever the weight. No real update is among them.\n\n"
        f"`python tests bench exact --size {arguments.size}`, {describe()}.\n\n"
        "| update | weights moved | `--exact` | zstd 3 of the xor | zstd 19 of the xor | zstd 19 of the expert | "
        "`--exact`, bits a weight |\n|---|---|---|---|---|---|---|\n" + "\n".join(sizes) + "\n\n"
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
