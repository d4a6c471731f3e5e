"""Kernels that a decode step launches, counted without a card: writes a table of docs/results/kernels-gpu.md.

python tests bench launches
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from engine.launches import WHOLE, step_launches, whole_step

PAGE = Path(__file__).parents[2] / "docs" / "results" / "kernels-gpu.md"
BLOCK = re.compile(r"(<!-- launches, generated -->\n).*?(<!-- end of launches -->)", re.DOTALL)
KIND = {"bits": 1, "rank": 16}


def table_rows(one: dict[bool, Counter[str]], two: dict[bool, Counter[str]]) -> Iterator[list[str]]:
    """Each kind, and all: in a layer, besides layers, and in 32, with experts and of the base alone."""
    wholes = {mixed: whole_step(one[mixed], two[mixed]) for mixed in (True, False)}
    names = sorted(wholes[True] | wholes[False], key=lambda name: (-wholes[True][name], -wholes[False][name], name))
    for name in [*names, ""]:
        cells = [f"`{name}`" if name else "all"]
        for mixed in (True, False):
            first, second, whole = (
                counts[name] if name else counts.total() for counts in (one[mixed], two[mixed], wholes[mixed])
            )
            each = second - first
            cells += [str(each or ""), str(first - each or ""), str(whole or "")]
        yield cells


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, two = (step_launches(Path(folder, str(layers)), layers, KIND) for layers in (1, 2))
    places = ["a layer", "besides", f"{WHOLE} layers"]
    titles = ["launch", *(f"{who}: {place}" for who in ("experts", "base alone") for place in places)]
    lines = [titles, ["---"] * len(titles), *table_rows(one, two)]
    block = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda found: f"{found[1]}\n{block}\n{found[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
