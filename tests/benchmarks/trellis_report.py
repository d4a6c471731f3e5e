"""What benchmarks.trellis measured as a Markdown page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meswitch_cli.estimates import wilson_interval

INTRO = Path(__file__).parent / "trellis_intro.md"
#: Weights of Mistral-7B's linears.
LINEARS_7B = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)


def write_page(data: Path, page: Path) -> None:
    """Write the page from the JSON files of a results folder."""
    parts = [INTRO.read_text()]
    if (data / "codes.json").exists():
        parts.append(_codes(json.loads((data / "codes.json").read_text())))
    for file in sorted(data.glob("*.json")):
        if file.stem != "codes":
            parts.append(_expert(file.stem, json.loads(file.read_text())))
    page.write_text("\n".join(parts))


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
    low, high = wilson_interval(ends["expert_right"], items)
    lines = [
        f"## {name}\n",
        f"{items} report items, {ends['tokens']} answer tokens of {ends['kl_items']} of them for KL. KL of the base to "
        "the full expert "
        f"{ends['base_kl']:.4f} nats a token; the base answers {ends['base_right']} rightly, the full expert "
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
            f"| {100 * found['kl'] / ends['base_kl']:.4f} | {100 * found['linear_kl'] / ends['base_kl']:.4f} "
            f"| {answers} | {found['cpu_seconds']:.0f} |"
        )
    machines = list(dict.fromkeys(found["machine"] for found in measured.values()))
    lines.append("\nOn " + "; ".join(machines) + ".\n")
    return "\n".join(lines)
