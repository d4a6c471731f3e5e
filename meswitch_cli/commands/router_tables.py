"""What router commands print: a report, a decision, an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meswitch_cli.commands.console import console, table
from meswitch_cli.router.train.report import interval, percent

if TYPE_CHECKING:
    from meswitch_cli.router.decide.explanation import Explanation
    from meswitch_cli.router.decide.router import RouteDecision
    from meswitch_cli.router.store.known import KnownPrompt
    from meswitch_cli.router.train.editing import Edit


_DOUBTS = ("domain", "likeliest", "verdict", "confidence", "prompt")
#: Share of test prompts with a twin in training from which the figures are an upper bound.
_MANY_TWINS = 0.3


def print_report(report: Mapping[str, Any]) -> None:
    """Domains, where prompts go, and the figures that sum it up."""
    out, test = console(), report["test"]
    if "per_domain" in test:
        domains = table("held-out prompts", "domain", "prompts", "precision", "recall")
        for label, item in test["per_domain"].items():
            domains.add_row(label, f"{item['prompts']:.0f}", percent(item["precision"]), percent(item["recall"]))
        out.print(domains)
    rows = test["confusion"]
    went = table("after both gates", "truth", *next(iter(rows.values())))
    for label, row in rows.items():
        went.add_row(label, *(str(count) for count in row.values()))
    out.print(went)
    if "accuracy" in test:
        gates = test["at_the_gates"]
        out.print(f"the right field is likeliest: {interval(test['accuracy'])} % of them (accuracy, 95 % interval)")
        routed, right = percent(gates["coverage"]["value"]), percent(gates["precision"]["value"])
        out.print(f"through both gates: {routed}, of those right {right}")
        out.print(f"error of the confidence (ECE, 0 is best): {test['after_calibration']['ece']:.3f}")
        if "out_of_domain" in test:
            out.print(f"own prompts told from others (AUROC, 1 is best): {test['out_of_domain']['auroc']:.3f}")
    if "rewording" in report:
        out.print(f"the same decision where prompts are reworded: {interval(report['rewording']['same'])} %")
    if report.get("doubts") and report["doubts"]["count"]:
        doubtful = table(
            f"{report['doubts']['count']} test prompts are refused, doubted or sent elsewhere", *_DOUBTS, text=_DOUBTS
        )
        for item in report["doubts"]["prompts"]:
            cells = (item["domain"], item["likeliest"], item["verdict"], f"{item['confidence']:.2f}", item["prompt"])
            doubtful.add_row(*cells)
        out.print(doubtful)
    if (report.get("twins") or 0) >= _MANY_TWINS:
        out.print(
            f"{percent(report['twins'])} of the test prompts have a twin in training (the same words but for names or "
            'numbers): on other people\'s prompts the router will be right less often. Give templates a "group"'
        )
    for name, figures in report.get("baselines", {}).items():
        shown = interval(figures["accuracy"]) + " %" if "accuracy" in figures else figures.get("failed", "")
        what = " (counts words, knows no model)" if name == "tfidf" else ""
        out.print(f"baseline {name}{what}: {shown}")


def print_decision(decision: RouteDecision) -> None:
    """A decision as a table."""
    shown = table(f"{decision.expert} ({decision.reason})", "expert", "probability")
    for label, value in sorted(decision.probabilities.items(), key=lambda item: -item[1]):
        shown.add_row(label, percent(value))
    out = console()
    out.print(shown)
    out.print(f"confidence {decision.confidence:.3f}, {decision.latency_ms:.1f} ms")


def print_explanation(explanation: Explanation, known: Sequence[KnownPrompt]) -> None:
    """Both gates' figures, and the known prompts nearest to the one asked about."""
    out = console()
    strict = explanation.strict_distance_threshold
    out.print(
        f"distance {explanation.distance:.3f} (0: an expert's own, 1: another field's; routed up to "
        f"{explanation.distance_threshold:.3f}, strictly {strict:.3f}); confidence {explanation.confidence:.3f} "
        f"(routed from {explanation.confidence_threshold:.3f})"
    )
    if explanation.nearest:
        shown = table("nearest known prompts", "similarity", "of", "prompt", text=("of", "prompt"))
        for item in explanation.nearest:
            prompt = known[item.point] if known else None
            field = item.owner or "no expert"
            if prompt is not None and prompt.field != item.owner:
                field = f"{item.owner} ({prompt.field})" if item.owner else prompt.field
            shown.add_row(f"{item.similarity:.2f}", field, prompt.excerpt if prompt is not None else "")
        out.print(shown)


def print_edit(edit: Edit) -> None:
    """What the other experts had and have."""
    shown = table("recall on held-out prompts, % [95 %]", "expert", "before", "after", "change, points")
    for label, before in edit.before.items():
        after = edit.after[label]
        change = 100 * (after["value"] - before["value"])
        shown.add_row(label, interval(before), interval(after), f"{change:+.1f}")
    if edit.added is not None:
        shown.add_row("new", "", interval(edit.added), "")
    out = console()
    out.print(shown)
    out.print(f"new prompts read in {edit.feature_seconds:.1f} s, refitted in {edit.refit_seconds:.1f} s")
