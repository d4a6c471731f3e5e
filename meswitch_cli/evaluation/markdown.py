"""`report.md`: the report's tables for people, every figure with its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meswitch_cli.evaluation.figures import COLUMNS, EXACT_MATCH, interval
from meswitch_cli.names import BASE

Table = tuple[Sequence[str], list[list[str]]]
#: By title, the text of a column's cell; None: the member of this name.
Columns = Mapping[str, Callable[[Mapping[str, Any]], str] | None]


def markdown(report: Mapping[str, Any]) -> str:
    """The page for a report as `Report.to_dict` gives it."""
    parts = ["# Evaluation\n", f"\n{heading(report)}\n"]
    for title, table, note in sections(report):
        parts.append(f"\n## {title}\n\n{_table(table)}\n" + (f"\n{note}\n" if note else ""))
    if report["errors"]:
        parts.append(
            "\n## Not measured\n\n" + "".join(f"- {item['where']}: {item['message']}\n" for item in report["errors"])
        )
    if report["notes"]:
        parts.append("\n## Notes\n\n" + "".join(f"- {note}\n" for note in report["notes"]))
    return "".join(parts)


def heading(report: Mapping[str, Any]) -> str:
    """What was evaluated, on what, with which versions."""
    machine, packages = report["environment"], report["environment"]["packages"]
    versions = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    state = "" if report["complete"] else "INCOMPLETE: the evaluation did not run to its end. "
    return (
        f"{state}Base {report['base']['id']}; made {report['created']} by meswitch {machine['meswitch']} on "
        f"{machine['device_name']} ({machine['device']}, {machine['dtype']}, {machine['mode']}, {machine['threads']} "
        f"threads), Python {machine['python']}, {versions}; seed {report['seed']}."
    )


def sections(report: Mapping[str, Any]) -> list[tuple[str, Table, str]]:
    """(title, table, note) of every part that has something to show."""
    found: list[tuple[str, Table, str]] = []
    for name in dict.fromkeys(row["set"] for row in report["fidelity"]):
        for expert in dict.fromkeys(row["expert"] for row in report["fidelity"] if row["set"] == name):
            rows = [row for row in report["fidelity"] if row["set"] == name and row["expert"] == expert]
            size = next((item["nbytes"] for item in report["experts"] if item["label"] == expert), None)
            found.append(
                (
                    f"Fidelity to {expert} on {name}",
                    fidelity_table(rows, size, answer_cells(report, name, expert)),
                    _set_note(report, name, expert),
                )
            )
    if report["tasks"]:
        found.append(("Tasks", _tabled(_TASKS, report["tasks"]), "Score with a 95 % interval over documents."))
    if report["comparisons"]:
        found.append(("Paired comparisons", _tabled(_COMPARISONS, report["comparisons"]), _COMPARISON_NOTE))
    if report["router"]:
        found.append(("Routing", router_table(report["router"]), report["router"]["note"]))
    if report["gates"]:
        found.append(("Limits", _tabled(_LIMITS, report["gates"]), ""))
    found.append(("Models", model_table(report), ""))
    return found


_COMPARISON_NOTE = (
    "Every comparison is paired by document: difference of scores with a 95 % interval, documents lost and gained, "
    "exact McNemar test (bootstrap where scores are not 0 or 1), p-values by Holm over all rows with the same "
    "opponent. MDE: the smallest difference that this many documents would find four times out of five. Where the "
    "interval reaches beyond the margin and the test finds nothing, the verdict is that n is too small, not that there "
    "is no difference."
)


def fidelity_table(
    rows: Sequence[Mapping[str, Any]],
    expert_nbytes: int | None = None,
    answers: Mapping[str, Sequence[str]] | None = None,
) -> Table:
    """Base, full expert and compressed models of one expert on one set.

    `expert_nbytes` is the full expert's size, `answers` each model's cells of `ANSWER_COLUMNS`, the full expert's as
    "full expert"; None: nothing was answered.
    """
    header = ["model", "MB", *(figure.title for figure in COLUMNS)]
    lines = []
    if rows[0].get("base_kl_mean") is not None:
        cells = [figure.base or figure.cell(rows[0], f"base_{figure.name}") for figure in COLUMNS]
        lines.append(["base", "0", *cells])
    size = "" if expert_nbytes is None else f"{expert_nbytes / 1e6:.1f}"
    lines.append(["full expert", size, *(figure.full_expert for figure in COLUMNS)])
    for row in rows:
        cells = [figure.cell(row, figure.name) for figure in COLUMNS]
        lines.append([row["model"], f"{row['nbytes'] / 1e6:.1f}", *cells])
    if answers:
        header += ANSWER_COLUMNS
        lines = [[*line, *answers.get(line[0], [""] * len(ANSWER_COLUMNS))] for line in lines]
    return header, lines


ANSWER_COLUMNS = ("right", "same answer, %", "lost, gained", "difference, points", "MDE, points")


def answer_cells(report: Mapping[str, Any], name: str, expert: str) -> dict[str, list[str]]:
    """By model, what exact match on a set found: the cells of `ANSWER_COLUMNS`."""
    scores = {row["model"]: row for row in report["tasks"] if (row["task"], row["metric"]) == (name, EXACT_MATCH)}
    found = {}
    wanted = {"against": expert, "role": "full expert", "task": name, "metric": EXACT_MATCH}
    for row in report["comparisons"]:
        if wanted.items() <= row.items():
            found[row["model"]] = [
                _right(scores[row["model"]]),
                f"{100 * row['same_answers'] / row['documents']:.1f}",
                f"−{row['lost']} +{row['gained']}",
                interval(row, "difference", 100, 1),
                f"{100 * row['minimum_detectable_effect']:.1f}",
            ]
    if expert in scores:
        found["full expert"] = [_right(scores[expert]), "100", "", "0", ""]
        if BASE in scores:
            found.setdefault(BASE, [_right(scores[BASE]), "", "", "", ""])
    return found


def _right(row: Mapping[str, Any]) -> str:
    return f"{round(row['score'] * row['documents'])} of {row['documents']}"


_TASKS: Columns = {
    **dict.fromkeys(("task", "metric", "model", "documents")),
    "score, %": lambda row: interval(row, "score", 100, 1),
}
_COMPARISONS: Columns = {
    **dict.fromkeys(("task", "metric", "model", "against")),
    "n": lambda row: str(row["documents"]),
    "difference, points": lambda row: interval(row, "difference", 100, 1),
    **dict.fromkeys(("lost", "gained")),
    "p (Holm)": lambda row: f"{row['p_holm']:.3g}",
    "MDE, points": lambda row: f"{100 * row['minimum_detectable_effect']:.1f}",
    "verdict": None,
}
_LIMITS: Columns = {
    "limit": lambda row: row["gate"],
    **dict.fromkeys(("model", "set")),
    "wanted": lambda row: f"{row['limit']:g}",
    "found": lambda row: "not measurable" if row["value"] is None else f"{row['value']:.5g}",
    "passed": lambda row: "yes" if row["passed"] else "NO",
}


def _tabled(columns: Columns, rows: Sequence[Mapping[str, Any]]) -> Table:
    return list(columns), [[cell(row) if cell else str(row[title]) for title, cell in columns.items()] for row in rows]


def router_table(router: Mapping[str, Any]) -> Table:
    header = ["choice", *(["loss, nats a token"] if router["loss"] else []), *router["tasks"]]
    lines = []
    for choice in ("base", "random", "routed", "oracle", "full experts"):
        line = [choice]
        if router["loss"]:
            line.append(interval(router["loss"][choice], "value"))
        for scores in router["tasks"].values():
            line.append(interval(scores[choice], "value", 100, 1))
        lines.append(line)
    return header, lines


def model_table(report: Mapping[str, Any]) -> Table:
    header = ["model", "kind", "id", "MB", "fingerprint or manifest SHA-256"]
    lines = [["base", "checkpoint", *_identity(report["base"])]]
    lines += [[item["label"], "full expert", *_identity(item)] for item in report["experts"]]
    for item in report["models"]:
        nbytes = item.get("nbytes")
        lines.append(
            [
                item["label"],
                item["kind"],
                f"of {item['expert']}",
                "" if nbytes is None else f"{nbytes / 1e6:.1f}",
                str(item.get("manifest_sha256", ""))[:16],
            ]
        )
    return header, lines


def _set_note(report: Mapping[str, Any], name: str, expert: str) -> str:
    item = next(item for item in report["sets"] if item["name"] == name and item["expert"] == expert)
    what = "answer tokens" if item["kind"] == "responses" else "tokens"
    skipped = f", {item['skipped']} skipped as too long" if item["skipped"] else ""
    return (
        f"{item['items']} items, {item['tokens']} {what}{skipped}; SHA-256 {item['sha256'][:16]}. KL in nats a token, "
        "to the full expert. ± and [ ]: 95 %, by document; a maximum has no interval."
    )


def _identity(item: Mapping[str, Any]) -> list[str]:
    return [item["id"], f"{item['nbytes'] / 1e6:.1f}", item["fingerprint"][:23]]


def _table(table: Table) -> str:
    header, rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )
