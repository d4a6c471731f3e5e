"""The page and the picture of what was measured of compressed fine-tunes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.compression_rows import (
    BASE,
    BY_ITSELF,
    DEFAULTS,
    EXPERT,
    OTHER_FORMS,
    OVERVIEW,
    ROWS,
    ROWS_OF,
    TRELLIS,
    VOCABULARY,
    label,
)
from meswitch_cli.evaluation.paired import compare_paired
from zoo import group

INTRODUCTION, WEAKER = (Path(__file__).with_name(f"compression_{part}.md") for part in ("intro", "weaker"))
#: What a plot joins by a line, and what it calls other methods.
_LINE = (
    *(f"{TRELLIS},bits={bits},rank=16,{VOCABULARY}={max(bits, 0.25)}" for bits in (0.125, 0.25, 0.5)),
    next(iter(DEFAULTS)),
)
_PLOTTED = {
    "bitdelta:embedding=2": "BitDelta",
    "bitdelta:masks=2": "BitDelta, 2 masks",
    "per-axis:axis=best": "per-axis scale",
    "rtn:bits=2,group=128": "2 bits in groups",
    "low-rank:bits=2": "low rank",
    "d-qrelo": "D-QRELO",
    "d-qrelo:order=svd-first": "D-QRELO, SVD first",
    "delta-come:bits=0.9,embedding=1": "Delta-CoMe, less",
    "delta-come:bits=1.2": "Delta-CoMe",
    "delta-come:bits=1.85": "Delta-CoMe, more",
    "dare": "DARE",
    "dare:choice=magnitude,rescale=projection": "DARE by magnitude",
}
#: Where a name would lie on another.
_OFFSETS = {
    _LINE[0]: (-4, 6),
    _LINE[2]: (4, 5),
    "low-rank:bits=2": (-5, -2),
    "d-qrelo": (5, 5),
    "d-qrelo:order=svd-first": (5, -9),
    "delta-come:bits=1.85": (5, -10),
    "dare:choice=magnitude,rescale=projection": (-6, 4),
}
COLUMNS = (
    "model", "MB", "KL, nats", "KL / base's, %", "loss", "right", "same answer, %", "lost, gained",
    "difference, points", "MDE, points",
)  # fmt: skip


def plot(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """KL in percent of the base's over megabytes, ours joined by a line, other methods named."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "meswitch"
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    of_base = sum(rows[BASE]["sums"]["kl"])
    points = {
        name: (row["nbytes"] / 1e6, 100 * sum(row["sums"]["kl"]) / of_base)
        for name, row in rows.items()
        if name not in (BASE, EXPERT)
    }
    ours = {name: point for name, point in points.items() if name in _LINE}
    axes.plot(
        *zip(*(ours[name] for name in _LINE if name in ours), strict=True), "o-", color="#3454d1", label="meswitch"
    )
    for name, point in ours.items():
        _tell(axes, label(name).strip("`"), point, _OFFSETS.get(name, (-6, -12)), "#3454d1")
    others = {name: point for name, point in points.items() if not name.startswith("meswitch") and "gptq" not in name}
    axes.plot(*zip(*others.values(), strict=True), "s", color="#62656d", markersize=4, label="other methods")
    for name, point in others.items():
        _tell(axes, _PLOTTED.get(name, name), point, _OFFSETS.get(name, (5, 4)), "#62656d")
    axes.set(yscale="log", xlabel="MB of one expert (the full model has 269)", ylabel="KL to it, % of the base's")
    axes.margins(x=0.14, y=0.1)
    axes.set_xlim(left=7)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _tell(axes: Any, text: str, point: tuple[float, float], offset: tuple[int, int], color: str) -> None:
    side = "right" if offset[0] < 0 else "left"
    axes.annotate(text, point, textcoords="offset points", xytext=offset, fontsize=8, color=color, ha=side)


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """`COLUMNS` of every measured row, in the order of `ROWS`."""
    full, lines = rows.get(EXPERT), []
    for name in ROWS:
        row = rows.get(name)
        if row is None:
            continue
        tokens = sum(row["sums"]["tokens"])
        line = [label(name), f"{row['nbytes'] / 1e6:.1f}"]
        line.append(f"{sum(row['sums']['kl']) / tokens:.3g}")
        line.append(f"{100 * sum(row['sums']['kl']) / sum(rows[BASE]['sums']['kl']):.3g}" if BASE in rows else "")
        line.append(f"{sum(row['sums']['loss']) / tokens:.4f}")
        line.append(f"{sum(row['right']):.0f} of {len(row['right'])}")
        if full is None:
            lines.append([*line, "", "", "", ""])
            continue
        found = compare_paired(row["right"], full["right"])
        change = found.difference
        value, low, high = (100 * part for part in (change.value, change.low, change.high))
        line += [f"{_same(row, full):.1f}", f"−{found.lost} +{found.gained}"]
        lines.append([*line, f"{value:.1f} [{low:.1f}, {high:.1f}]", f"{100 * found.minimum_detectable_effect:.1f}"])
    return lines


def page(folder: Path, cache: Path | None = None) -> str:
    """The page of what `folder` has of the groups' experts, each with what its delta is."""
    introduction, sections = INTRODUCTION.read_text(), []
    for of in ROWS_OF:
        files = {name: folder / f"{name}.json" for name in group.GROUPS[of]}
        stored = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
        introduction = introduction.replace(f"@{of}@", overview({name: item["rows"] for name, item in stored.items()}))
        for name, item in stored.items():
            figures = group.group_at(of, cache).figures_file(name)
            described = _described(json.loads(figures.read_text())) if figures.exists() else ""
            sections.append(_section(f"{of}: {name}", item, described))
    return "".join([introduction, *sections, WEAKER.read_text()])


def overview(measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """KL, in % of the base's, and share of same answers of the methods of `OVERVIEW`, one column an expert."""
    lines = [
        f"| KL, % of the base's; same answer, % | MB | {' | '.join(measured)} |",
        "|---" * (len(measured) + 2) + "|",
    ]
    for name, called in OVERVIEW.items():
        found = [_row_of(name, expert, rows) for expert, rows in measured.items()]
        sizes = sorted(row["nbytes"] / 1e6 for row in found if row is not None)
        if not sizes:
            continue
        span = f"{sizes[0]:.1f}" if sizes[-1] - sizes[0] < 0.1 else f"{sizes[0]:.1f} to {sizes[-1]:.1f}"
        cells = ["" if row is None else _near(row, rows) for row, rows in zip(found, measured.values(), strict=True)]
        lines.append(f"| {called} | {span} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row_of(name: str, expert: str, rows: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """A measured row; for an artifact of `compress` that was not, the method that it is."""
    if name == BY_ITSELF and name not in rows:
        method = OTHER_FORMS.get(expert, next(iter(DEFAULTS)))
        return rows.get(method) if method else None
    return rows.get(name)


def _near(row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """KL in % of the base's, and the share of answers that are the full expert's."""
    share = 100 * sum(row["sums"]["kl"]) / sum(rows[BASE]["sums"]["kl"])
    places = 1 - math.floor(math.log10(share)) if share > 0 else 0
    return f"{share:.{max(0, places)}f}; {_same(row, rows[EXPERT]):.1f}"


def _same(row: Mapping[str, Any], full: Mapping[str, Any]) -> float:
    """Answers that are the full expert's to the letter, in %."""
    pairs = list(zip(row["answers"], full["answers"], strict=True))
    return 100 * sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def _section(title: str, stored: Mapping[str, Any], described: str) -> str:
    key = stored["key"]
    lines = [
        f"\n## {title}\n\n{described}{key['items']} items for KL and loss, {key['answers']} for answers, "
        f"{stored['machine']}.\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    ]
    return "".join(lines + [f"| {' | '.join(line)} |\n" for line in table(stored["rows"])])


def _described(figures: Mapping[str, Any]) -> str:
    """How the fine-tune was made and what its delta is."""
    recipe, delta = figures["recipe"], figures["delta"]
    schedule = recipe["schedule"]
    return (
        f"Skill {recipe['skill']}, method {recipe['method']}, {schedule['steps']} steps of {schedule['batch_tokens']} "
        f"tokens, learning rate {schedule['learning_rate']:g}, saved in {recipe['dtype']}. The delta has "
        f"{100 * delta['relative_delta']:.2g} % of the weights' norm, {100 * delta['unchanged']:.0f} % of the weights "
        f"are the base's, 16 directions hold {100 * delta['leading_energy']:.0f} % of its energy.\n\n"
    )
