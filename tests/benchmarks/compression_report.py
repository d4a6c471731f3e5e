"""The rows measured by benchmarks.compression as a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meswitch_cli.evaluation.statistics import Estimate, ratio_of_sums

HEADER = (
    "| setting | MB | KL, % of base's [95 %] | gap recovered, % [95 %] | top-1 agreement, % [95 %] "
    "| KL on choice, % |\n"
    "|---|---|---|---|---|---|"
)


def write_report(results: Path, path: Path, order: Sequence[str]) -> None:
    """Write the page from the JSON files of a results folder, rows in the order of these labels."""
    sections = []
    for file in sorted(results.glob("*.json")):
        value = json.loads(file.read_text())
        rows = sorted(value["rows"], key=lambda row: order.index(row["label"]) if row["label"] in order else -1)
        sections.append(section(file.stem, rows) + f"\nOn {value['machine']}.\n")
    if not sections:
        return
    intro = (Path(__file__).parent / "compression_intro.md").read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(intro + "\n" + "\n".join(sections))


def section(expert: str, rows: list[dict[str, Any]]) -> str:
    """One expert's table."""
    by_label = {row["label"]: row for row in rows}
    base, full = by_label["base"], by_label["full expert"]
    lines = [
        f"## {expert}\n",
        f"Report part: {len(full['report']['tokens'])} items, {sum(full['report']['tokens']):.0f} answer tokens; "
        f"loss of the base {per_token(base)[0]:.4f}, of the full expert {per_token(full)[0]:.4f}; KL of the base to "
        f"the full expert {per_token(base)[1]:.4f} nats a token. The full expert is {full['bytes'] / 1e6:.1f} MB.\n",
        HEADER,
    ]
    for row in rows:
        if row["label"] == "full expert":
            continue
        lines.append(
            f"| {row['label']} | {row['bytes'] / 1e6:.1f} | {_cell(kl_share(row, base, 'report'), 3)} | "
            f"{_cell(gap_recovered(row, base, full, 'report'), 2)} | {_cell(agreement(row, 'report'), 2)} | "
            f"{100 * kl_share(row, base, 'choice').value:.3f} |"
        )
    return "\n".join(lines) + "\n"


def per_token(row: dict[str, Any]) -> tuple[float, float]:
    """(loss, KL) a token on the report part."""
    part = row["report"]
    return sum(part["loss"]) / sum(part["tokens"]), sum(part["kl"]) / sum(part["tokens"])


def kl_share(row: dict[str, Any], base: dict[str, Any], part: str) -> Estimate:
    return ratio_of_sums(row[part]["kl"], base[part]["kl"])


def gap_recovered(row: dict[str, Any], base: dict[str, Any], full: dict[str, Any], part: str) -> Estimate:
    """(base loss - row's loss) / (base loss - full expert's loss)."""
    gained = [a - b for a, b in zip(base[part]["loss"], row[part]["loss"], strict=True)]
    possible = [a - b for a, b in zip(base[part]["loss"], full[part]["loss"], strict=True)]
    return ratio_of_sums(gained, possible)


def agreement(row: dict[str, Any], part: str) -> Estimate:
    return ratio_of_sums(row[part]["agreed"], row[part]["tokens"])


def _cell(estimate: Estimate, digits: int) -> str:
    value, low, high = (100 * item for item in (estimate.value, estimate.low, estimate.high))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
