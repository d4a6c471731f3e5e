"""`report.html`: tables, plots and lost answers in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from meswitch_cli.evaluation.markdown import Table, heading, sections
from meswitch_cli.evaluation.plots import figures

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .6rem 0; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #999; }
.scroll { overflow-x: auto; }
.note { color: #555; font-size: 13px; max-width: 60rem; }
.wrong { color: #a02020; }
figure { margin: 1rem 0; } figcaption { color: #555; font-size: 13px; }
figure svg { max-width: 100%; height: auto; }
pre { white-space: pre-wrap; margin: 0; font-size: 12px; max-width: 26rem; }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page for a report as `Report.to_dict` gives it; everything from outside is escaped."""
    parts = ["<h1>Evaluation</h1>", f"<p>{escape(heading(report))}</p>"]
    for item in report["errors"]:
        parts.append(f'<p class="wrong">{escape(item["where"])}: {escape(item["message"])}</p>')
    for title, table, note in sections(report):
        parts.append(f"<h2>{escape(title)}</h2>{_table(table)}")
        parts.append(f'<p class="note">{escape(note)}</p>' if note else "")
    drawn = figures(report)
    if drawn:
        parts.append("<h2>Plots</h2>")
        parts += [f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" for caption, svg in drawn]
    elif report["fidelity"]:
        parts.append("<p class=note>No plots: matplotlib is not installed (pip install 'meswitch[eval]').</p>")
    parts += _flips(report["flips"])
    parts += [f'<p class="note">{escape(note)}</p>' for note in report["notes"]]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>meswitch evaluation</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    header, rows = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _flips(flips: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = []
    for kind, title in (("lost", "Lost answers"), ("gained", "Gained answers")):
        found = [item for item in flips if item["change"] == kind]
        if not found:
            continue
        names = ("task", "document", "prompt", "target", "expert_answer", "answer")
        head = ("task", "document", "prompt", "right answer", "full expert", "compressed")
        body = "".join(
            f"<tr><td>{escape(item['model'])}</td>"
            + "".join(f"<td><pre>{escape(str(item[name]))}</pre></td>" for name in names)
            + "</tr>"
            for item in found
        )
        header = "".join(f"<th>{name}</th>" for name in ("model", *head))
        parts.append(f'<h2>{title}</h2><div class="scroll"><table><tr>{header}</tr>{body}</table></div>')
    return parts
