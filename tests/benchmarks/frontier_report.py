"""The rows measured by benchmarks.frontier as a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frontier_rows import ABLATION, BASE, EXPERT, FRONTIER, RANKS, SWEEP, rows
from meswitch_cli.evaluation.paired import compare_paired
from meswitch_cli.evaluation.statistics import Estimate, ratio_of_sums

INTRO = Path(__file__).parent / "frontier_intro.md"
HEADER = "| {} | MB | bits a weight | KL, % of base's [95 %] | gap recovered, % [95 %] | same top token, % [95 %] |"
TASK_HEADER = " right | against the full expert's: lost, gained; difference, points [95 %] |"
Row = Mapping[str, Any]


def write_page(results: Path, page: Path) -> None:
    """Write the page from the JSON files of a results folder; nothing where there are none."""
    sections = []
    for file in sorted(results.glob("*.json")):
        value = json.loads(file.read_text())
        if {BASE, EXPERT} <= value["rows"].keys():
            sections.append(_expert(file.stem.rpartition("-")[0], value))
    if sections:
        page.write_text(INTRO.read_text() + "\n" + "\n".join(sections))


def _expert(name: str, value: dict[str, Any]) -> str:
    measured, weights = value["rows"], value["weights"]
    base = measured[BASE]["report"]
    missing = [spec for spec in rows() if spec not in measured]
    lines = [
        f"## {name}\n",
        f"{len(base['tokens'])} report items, {sum(base['tokens']):.0f} answer tokens; loss of the base "
        f"{_mean(base, 'loss'):.4f}, of the full expert {_mean(base, 'expert_loss'):.4f} nats a token; KL of the base "
        f"to the full expert {_mean(base, 'kl'):.4f}. {weights / 1e6:.1f} million weights; the full expert is "
        f"{2 * weights / 1e6:.1f} MB. Of {len(measured[EXPERT]['right'])} documents of its task the base answers "
        f"{sum(measured[BASE]['right']):.0f} rightly, the full expert {sum(measured[EXPERT]['right']):.0f}.\n",
    ]
    for title, specs in FRONTIER.items():
        lines += _table(f"### Frontier, {title}", "method", specs, measured, weights)
    for title, specs in ABLATION.items():
        lines += _table(f"### Which channels stay, {title}", "meswitch setting", specs, measured, weights)
    for what, sweep in (("channels stay", SWEEP), ("directions stay, without salient channels", RANKS)):
        for bits, specs in sweep.items():
            title = f"### How many {what}, {bits} {'bit' if bits == 1 else 'bits'}"
            lines += _table(title, "meswitch setting", specs, measured, weights)
    machines = list(dict.fromkeys(row["machine"] for row in measured.values()))
    lines.append("On " + "; ".join(machines) + ".\n")
    if missing:
        lines.append(
            f"{len(measured)} of the {len(rows())} rows of `tests/benchmarks/frontier_rows.py` have been measured; the "
            f"same command measures the other {len(missing)}.\n"
        )
    return "\n".join(lines)


def _table(title: str, first: str, specs: Sequence[str], measured: Mapping[str, Row], weights: int) -> list[str]:
    found = [spec for spec in specs if spec in measured]
    if not found:
        return []
    base = measured[BASE]["report"]
    tasks = all("right" in measured[spec] for spec in found)
    header = HEADER.format(first) + (TASK_HEADER if tasks else "")
    lines = [title + "\n", header, "|" + "---|" * (header.count("|") - 1)]
    for spec in sorted(found, key=lambda spec: kl_share(measured[spec]["report"], base).value):
        row = measured[spec]
        part = row["report"]
        line = (
            f"| `{spec}` | {row['bytes'] / 1e6:.1f} | {8 * row['bytes'] / weights:.2f} | "
            f"{_cell(kl_share(part, base), 3)} | {_cell(gap_recovered(part, base), 2)} | "
            f"{_cell(ratio_of_sums(part['agreed'], part['tokens']), 2)} |"
        )
        lines.append(line + (_task_cells(row["right"], measured[EXPERT]["right"]) if tasks else ""))
    return [*lines, ""]


def _task_cells(right: Sequence[float], expert: Sequence[float]) -> str:
    found = compare_paired(right, expert)
    return f" {sum(right):.0f} | {found.lost}, {found.gained}; {_cell(found.difference, 1)} |"


def kl_share(part: Row, base: Row) -> Estimate:
    """KL to the full expert over the base's, with a bootstrap by item."""
    return ratio_of_sums(part["kl"], base["kl"])


def gap_recovered(part: Row, base: Row) -> Estimate:
    """(base's loss − the row's) / (base's loss − the full expert's)."""
    gained = [a - b for a, b in zip(base["loss"], part["loss"], strict=True)]
    possible = [a - b for a, b in zip(base["loss"], base["expert_loss"], strict=True)]
    return ratio_of_sums(gained, possible)


def _mean(part: Row, name: str) -> float:
    return float(sum(part[name]) / sum(part["tokens"]))


def _cell(estimate: Estimate, digits: int) -> str:
    value, low, high = (100 * item for item in (estimate.value, estimate.low, estimate.high))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
