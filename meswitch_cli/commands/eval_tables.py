"""What `eval` prints on a terminal: tables with the figures that decide, and a sentence that judges each artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meswitch_cli.commands.console import console, table
from meswitch_cli.evaluation.figures import plus_minus
from meswitch_cli.evaluation.markdown import sections

#: Shares of the base's KL to the full expert, and what a model is to it that leaves less than that. The defaults of
#: `compress` left 0.03 % at most on the fine-tunes of docs/results/compression.md, one bit of signs alone 7 to 16 %.
JUDGEMENTS = (
    (0.001, "hardly to be told from the full expert"),
    (0.01, "close to the full expert"),
    (0.1, "near the full expert, but not as near as compress usually comes; try --rank 16 or more --bits"),
    (1.0, "far from the full expert: use more --bits, and read `meswitch inspect --base --expert`"),
    (float("inf"), "no nearer to the full expert than the base is: do not serve it"),
)
#: Items below which a figure is rough, however narrow its interval looks.
FEW_ITEMS = 20


def print_tables(report: Mapping[str, Any]) -> None:
    """Fidelity in six columns, all other parts whole; report.md has every figure."""
    out = console()
    for name, expert in dict.fromkeys((row["set"], row["expert"]) for row in report["fidelity"]):
        rows = [row for row in report["fidelity"] if (row["set"], row["expert"]) == (name, expert)]
        shown = table(f"fidelity to {expert} on {name}", "model", "MB", "KL", "% of base's", "same top, %", "gap, %")
        if (base := rows[0].get("base_kl_mean")) is not None:
            shown.add_row("base", "0", f"{base:.3g}", "100", f"{100 * rows[0]['base_top1_agreement']:.1f}", "0")
        for row in rows:
            share, gap = row.get("kl_share"), row.get("gap_recovered")
            shown.add_row(
                row["model"],
                f"{row['nbytes'] / 1e6:.1f}",
                f"{row['kl_mean']:.3g}",
                "" if share is None else f"{100 * share:.3g}",
                plus_minus(row, "top1_agreement", 100, 1),
                "no clear gap" if gap is None else f"{100 * gap:.1f}",
            )
        out.print(shown)
    for title, (header, lines), note in sections(report):
        if title.startswith("Fidelity") or title == "Models":
            continue
        shown = table(title, *header)
        for line in lines:
            shown.add_row(*line)
        out.print(shown)
        if note:
            out.print(note)


def judgements(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each artifact, on the set where it is farthest from its expert; none without a text."""
    artifacts = [item for item in report["models"] if item["kind"] == "artifact"]
    told = []
    for item in artifacts:
        rows = [row for row in report["fidelity"] if row["model"] == item["label"] and row.get("kl_share") is not None]
        if rows:
            what = ", as an engine codes it when it loads it," if item.get("served") else ""
            told.append(_judgement(max(rows, key=lambda row: row["kl_share"]), len(rows), what))
    return told


def _judgement(row: Mapping[str, Any], sets: int, what: str) -> str:
    share = row["kl_share"]
    words = next(words for limit, words in JUDGEMENTS if share < limit)
    where = row["set"] if sets == 1 else f"{row['set']}, the worst of {sets} sets"
    sure = "" if row["items"] >= FEW_ITEMS else f". {row['items']} items are few: measure more before you rely on it"
    agreed = f"{100 * row['top1_agreement']:.1f} % of its likeliest tokens are the expert's"
    return (
        f"{row['model']}{what} is {words}. On {where}, its KL is {row['kl_mean']:.2g} nats a token, "
        f"{100 * share:.2g} % of the base's, and {agreed}{sure}"
    )
