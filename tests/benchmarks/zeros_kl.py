"""What a zero level does to predictions: KL of codes with and without one on an update that moves few weights.

    python tests bench zeros_kl [--group kinds] [--expert reinforced] [--items 6] [--ranks 0,16] [--codes ternary]

A prototype in fp32: every linear by one code with an unbiased step a row, beside so many directions or none, nothing
salient; embedding and norms are the expert's own. A ternary code is stored in 1.6 bits, a dead zone has four levels of
which one is zero. Prints rows for docs/results/sparse.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import safetensors.torch
import torch

from benchmarks.machine import describe
from benchmarks.sparse import WEIGHTS, Judge, Tensors, divergences, is_linear, texts_of
from benchmarks.zeros import PACKED_TERNARY, dead_zone_levels, ternary_levels, unbiased_values
from meswitch_cli.delta.rounding import Rounder
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.steps import FIT_ROUNDS
from zoo.cache import Zoo, folder_at

Coder = Callable[[torch.Tensor], torch.Tensor]


def rounded(bits: float, code: str) -> Coder:
    """What a code of the product makes of rows, with unbiased steps."""
    settings = QuantizerSettings(bits, 0, code=code)  # type: ignore[arg-type]

    def values(rows: torch.Tensor) -> torch.Tensor:
        rounder = Rounder(settings=settings, scale=None, salient=torch.empty(0, dtype=torch.long))
        fit = rounder.fit(rows, FIT_ROUNDS)
        return rounder.values(fit.multiples, fit.unbiased)

    return values


def with_zero(levels: Coder) -> Coder:
    """What levels, one of them zero, make of rows; rows of zeros stay."""

    def values(rows: torch.Tensor) -> torch.Tensor:
        result, some = torch.zeros_like(rows), rows.square().sum(1) > 0
        if some.any():
            result[some] = unbiased_values(levels(rows[some]), rows[some])
        return result

    return values


CODERS: dict[tuple[str, float], Coder] = {
    **{("trellis", bits): rounded(bits, "trellis") for bits in (0.25, 1)},
    **{("scalar", bits): rounded(bits, "scalar") for bits in (1, 2)},
    ("ternary", PACKED_TERNARY): with_zero(ternary_levels),
    ("dead zone", 2): with_zero(dead_zone_levels),
}


def directions(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The delta's largest directions, unrounded."""
    if not rank:
        return torch.zeros_like(delta)
    torch.manual_seed(0)
    left, values, right = torch.svd_lowrank(delta, rank + 8, niter=2)
    return (left[:, :rank] * values[:rank]) @ right[:, :rank].T


def coded(base: Tensors, expert: Tensors, rank: int, coder: Coder | None) -> tuple[Tensors, float]:
    """The expert with its linears by a code, None: by the directions alone; and the codes' error over the deltas'
    energy."""
    result, error, energy = dict(expert), 0.0, 0.0
    for name, weight in expert.items():
        if not is_linear(name, weight):
            continue
        delta = weight.float() - base[name].float()
        found = directions(delta, rank)
        if coder is not None:
            codes = coder(delta - found)
            found = codes + directions(delta - codes, rank)  # fitted last, as the product's are
        error += float((delta - found).square().sum())
        energy += float(delta.square().sum())
        result[name] = base[name].float() + found
    return result, error / energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", default="kinds")
    parser.add_argument("--expert", default="reinforced")
    parser.add_argument("--items", type=int, default=6)
    parser.add_argument("--ranks", default="0,16")
    parser.add_argument("--codes", help="of these alone, as ternary,scalar")
    options = parser.parse_args()
    zoo = Zoo(folder_at(options.group), (options.expert,))
    base = safetensors.torch.load_file(zoo.base / WEIGHTS)
    expert = safetensors.torch.load_file(zoo.experts[options.expert] / WEIGHTS)
    texts = texts_of(zoo, options.expert, options.items)
    judge = Judge(zoo.base, texts, base["model.embed_tokens.weight"].shape[0])
    full = judge.predictions(expert)
    (gap, on_random) = divergences(full, judge.predictions(base))
    linears = [name for name in base if is_linear(name, base[name])]
    moved = sum(int((base[name] != expert[name]).sum()) for name in linears)
    moved_share = moved / sum(base[name].numel() for name in linears)
    tokens = sum(text.numel() for text in texts)
    print(
        f"{options.expert} of {options.group}: {moved_share:.1%} of the linears' weights moved, base's KL {gap:.2e} on "
        f"{tokens} tokens of {options.items} items, {on_random:.2e} on random ones; {describe()}\n",
        flush=True,
    )
    print("| directions | code | bits | noise, % of the delta's energy | KL, % of the base's | on random tokens |")
    print("|---|---|---|---|---|---|")
    for rank in map(int, options.ranks.split(",")):
        coders: list[tuple[tuple[str, float], Coder | None]] = [
            (key, coder) for key, coder in CODERS.items() if not options.codes or key[0] in options.codes.split(",")
        ]
        for (label, bits), coder in [*([(("none", 0.0), None)] if rank else []), *coders]:
            tensors, noise = coded(base, expert, rank, coder)
            own, random = divergences(full, judge.predictions(tensors))
            print(
                f"| {rank} | {label} | {bits} | {100 * noise:.1f} | {100 * own / gap:.3f} | "
                f"{100 * random / on_random:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
