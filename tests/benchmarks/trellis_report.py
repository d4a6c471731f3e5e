"""What benchmarks.trellis measured as a Markdown page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meswitch_cli.delta.codes import TRELLIS_CODES
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import expected_entry
from meswitch_cli.estimates import wilson_interval

INTRO = Path(__file__).parent / "trellis_intro.md"
#: Mistral-7B's linears, how many of each shape, and its vocabulary's tensors.
LINEARS = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
VOCABULARY = (32000, 4096)
LINEARS_7B = sum(rows * columns * count for (rows, columns), count in LINEARS.items())
SCALAR_1, SCALAR_2 = ("1 bit, scalar", 1, "scalar"), ("2 bits, scalar", 2, "scalar")


def write_page(data: Path, page: Path) -> None:
    """Write the page from the JSON files of a results folder."""
    parts = [INTRO.read_text()]
    if (data / "codes.json").exists():
        parts.append(_codes(json.loads((data / "codes.json").read_text())))
    for file in sorted(data.glob("*.json")):
        if file.stem != "codes":
            parts.append(_expert(file.stem, json.loads(file.read_text())))
    page.write_text("\n".join([*parts, _sizes()]))


def _sizes() -> str:
    """Bytes of an expert of Mistral-7B's shape whose tensors all differ, on disk and in a slot, computed."""
    lines = [
        "## Mistral-7B's shape\n",
        "Bytes of an expert whose tensors all differ from the base's, computed from the shapes: 8 salient channels, "
        "rank 16, embedding and head at 2 bits. *In a slot* are the codes of the linears on the device, *whole* what "
        "all of it takes on disk; the full expert has 14.48 GB.\n",
        "| linears | codes, GB | in a slot, GB | steps, channels, directions, GB | embedding, head, GB | whole, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, bits, code in (
        *((f"{bits} bit, trellis", bits, "trellis") for bits in TRELLIS_CODES),
        SCALAR_1,
        SCALAR_2,
    ):
        codes = beside = slot = 0
        for (rows, columns), count in LINEARS.items():
            entry = expected_entry(QuantizerSettings(bits, 8, rank=16, code=code), (rows, columns))
            own = 4 * rows * entry.code_words
            codes += count * own
            beside += count * (entry.expected_nbytes(2) - own)
            slot += count * rows * columns * entry.width // 8
        ends = expected_entry(QuantizerSettings(2, 0), VOCABULARY).expected_nbytes(2)
        ends += expected_entry(QuantizerSettings(2, 8), VOCABULARY).expected_nbytes(2)
        sizes = " | ".join(f"{size / 1e9:.3f}" for size in (codes, slot, beside, ends, codes + beside + ends))
        lines.append(f"| {name} | {sizes} |")
    return "\n".join([*lines, ""])


def _codes(value: dict[str, Any]) -> str:
    lines = [
        "## Codes\n",
        "Noise of unbiased steps over the energy of the rows, 4,096 wide; the bound is that of any code of as many "
        "bits on a Gaussian, 1 / (2^(2 bits) − 1).\n",
        "| code | Gaussian | bound | Laplacian |",
        "|---|---|---|---|",
    ]
    for name, bits, on_gaussian, on_laplacian in value["noise"]:
        lines.append(f"| {name} | {on_gaussian:.4g} | {1 / (4.0**bits - 1):.4g} | {on_laplacian:.4g} |")
    lines += [
        "\nProcessor time of `quantize` with 8 salient channels on one thread, the least of three, and the same times "
        f"the {LINEARS_7B / 1e9:.2f} billion weights of Mistral-7B's linears, computed, on two cores.\n",
        "| code | s a million weights | with rank 16 | 7B with rank 16, minutes |",
        "|---|---|---|---|",
    ]
    for name, plain, ranked in value["seconds"]:
        lines.append(f"| {name} | {plain * 1e6:.4f} | {ranked * 1e6:.4f} | {ranked * LINEARS_7B / 2 / 60:.1f} |")
    lines.append(f"\nOn {value['machine']}.\n")
    return "\n".join(lines)


def _expert(name: str, value: dict[str, Any]) -> str:
    ends, measured = value["ends"], value["rows"]
    items = ends["items"]
    base = f"the base answers {ends['base_right']} rightly, " if "base_right" in ends else ""
    low, high = wilson_interval(ends["expert_right"], items)
    lines = [
        f"## {name}\n",
        f"{items} report items, {ends['tokens']} answer tokens of {ends['kl_items']} of them for KL. KL of the base to "
        "the full expert "
        f"{ends['base_kl']:.4f} nats a token; {base}the full expert answers "
        f"{ends['expert_right']} "
        f"(95 % interval {100 * low:.0f} to {100 * high:.0f} %). KL in percent of the base's; *linears alone* has the "
        "expert's own embedding.\n",
        "| linears | MB | of these linears | bits a linear's weight | weight noise | KL, % | linears alone "
        "| same answers | right | compressing, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, found in measured.items():
        answers = f"{found['same']} | {found['right']}" if "same" in found else "|"
        lines.append(
            f"| {row} | {found['nbytes'] / 1e6:.2f} | {found['linear_nbytes'] / 1e6:.2f} "
            f"| {8 * found['linear_nbytes'] / found['linear_weights']:.2f} | {found['noise']:.3f} "
            f"| {100 * found['kl'] / ends['base_kl']:.3g} | {100 * found['linear_kl'] / ends['base_kl']:.3g} "
            f"| {answers} | {found['cpu_seconds']:.0f} |"
        )
    machines = list(dict.fromkeys(found["machine"] for found in measured.values()))
    lines.append("\nOn " + "; ".join(machines) + ".\n")
    return "\n".join(lines)
