"""Defaults, their neighbours and every other method on the strong experts: writes docs/results/strong.md.

    python tests bench strong [--group kinds|coder] [--experts code] [--rows 2] [--items 32] [--answers 200] [--report]

Each row is kept outside the repository as soon as it is measured, and not measured again as long as base, expert and
sizes are the same: stopped anywhere, the same command goes on. `--report` only makes the page from what there is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier import StoredActivations
from benchmarks.machine import describe
from meswitch_cli.artifact.disk import write_atomically
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.evaluation.baselines.model import baseline_candidate
from meswitch_cli.evaluation.exact_match import exact_match
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.evaluation.figures import EXACT_MATCH
from meswitch_cli.evaluation.paired import compare_paired
from meswitch_cli.evaluation.prompts import EncodedSet, encode_set, read_set
from meswitch_cli.evaluation.subjects import Expert, open_experts
from meswitch_cli.model.build import build_model
from meswitch_cli.model.tokenizer import end_ids
from meswitch_cli.model.weights import CheckpointWeights, context_length
from zoo import group
from zoo.compare import compare, reference_logits, sums_by_item
from zoo.item import read_items
from zoo.skills import outcome

PAGE = Path(__file__).parents[2] / "docs" / "results" / "strong.md"
INTRODUCTION = Path(__file__).with_name("strong_intro.md")
PICTURE = PAGE.parents[1] / "images" / "frontier.svg"
CACHE = Path.home() / ".cache" / "meswitch-zoo"
BASE, EXPERT = "base", "full expert"
_OURS = "steps=output-unbiased,activations=random"
_ONE = f"meswitch:bits=1,salient=8,channel_scale=rms,{_OURS}"
_TRELLIS = f"meswitch:code=trellis,salient=8,{_OURS}"
#: What `meswitch compress` does by itself at 1, 2 and 4 bits, as methods.
DEFAULTS = {
    f"{_ONE},rank=16": "`--bits 1`",
    f"meswitch:bits=2,salient=8,{_OURS}": "`--bits 2`",
    f"meswitch:bits=4,salient=8,{_OURS},embedding=4": "`--bits 4`",
}
#: Other methods that are an option or two of `meswitch compress`.
OPTIONS = {
    f"{_TRELLIS},bits=0.125,rank=16,embedding=1": "`--bits 0.125`",
    f"{_TRELLIS},bits=0.25,rank=16,embedding=1": "`--bits 0.25`",
    f"{_TRELLIS},bits=0.5,rank=16,embedding=1": "`--bits 0.5`",
    f"{_TRELLIS},bits=0.125,rank=16": "`--bits 0.125 --embedding-bits 2`",
    f"{_TRELLIS},bits=0.25,rank=16": "`--bits 0.25 --embedding-bits 2`",
    f"{_TRELLIS},bits=0.25,rank=16,channel_scale=rms": "`--bits 0.25 --embedding-bits 2 --channel-scale rms`",
    f"{_TRELLIS},bits=0.5,rank=16": "`--bits 0.5 --embedding-bits 2`",
    f"{_TRELLIS},bits=1,rank=16": "`--bits 1 --code trellis --embedding-bits 2`",
    f"{_ONE},rank=64": "`--bits 1 --rank 64`",
    f"{_ONE},rank=0": "`--bits 1 --rank 0`",
    f"meswitch:bits=1,salient=0,channel_scale=rms,{_OURS},rank=16,embedding=1": (
        "`--bits 1 --salient 0 --embedding-bits 1`"
    ),
    f"meswitch:bits=2,salient=8,{_OURS},rank=16": "`--bits 2 --rank 16`",
}
#: Fixed before any was measured; those that need data last, so that a run without it has the rest.
ROWS = (
    BASE,
    EXPERT,
    *DEFAULTS,
    *OPTIONS,
    "bitdelta:embedding=2",
    "bitdelta:masks=2",
    "per-axis:axis=best",
    "rtn:bits=2,group=128",
    "low-rank:bits=2",
    "d-qrelo",
    "d-qrelo:order=svd-first",
    "delta-come:bits=1.2",
    "delta-come:bits=1.85",
    "dare",
    "dare:choice=magnitude,rescale=projection",
    "d-qrelo:rounding=gptq",
    "delta-come:bits=1.2,rounding=gptq",
    "delta-come:bits=1.85,rounding=gptq",
)
#: What is measured of the other kinds of fine-tune, and on the other base.
KIND_ROWS = (
    BASE,
    EXPERT,
    *DEFAULTS,
    f"{_TRELLIS},bits=0.25,rank=16,embedding=1",
    f"{_TRELLIS},bits=0.25,rank=16",
    "bitdelta:embedding=2",
    "bitdelta:masks=2",
    "rtn:bits=2,group=128",
    "low-rank:bits=2",
    "d-qrelo",
    "delta-come:bits=1.2",
)
#: What a plot joins by a line, and what it calls other methods.
_LINE = (
    *(f"{_TRELLIS},bits={bits},rank=16,embedding=1" for bits in (0.125, 0.25, 0.5)),
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
ROWS_OF = {"strong": ROWS, "kinds": KIND_ROWS, "coder": KIND_ROWS}
COLUMNS = (
    "model", "MB", "KL, nats", "KL / base's, %", "loss", "right", "same answer, %", "lost, gained",
    "difference, points", "MDE, points",
)  # fmt: skip


class Bench:
    """One expert of a group: its items, its full model's logits and answers, and what was measured."""

    def __init__(self, of: str, name: str, items: int, answers: int, folder: Path) -> None:
        zoo = group.group_at(of)
        self.name, self.file = name, folder / f"{name}.json"
        self.base = CheckpointWeights(Checkpoint.open(str(zoo.base)))
        (self.expert,) = open_experts([f"{name}={zoo.experts[name]}"], self.base)
        self.lines = read_items(zoo.items_file(name, "report"))[:answers]
        self.data = read_set(zoo.items_file(name, "report"))
        self.encoded = _encoded(self.data, self.expert, answers)
        self.items: Sequence[EncodedItem] = self.encoded.items[:items]
        key = {"base": self.base.fingerprint, "expert": self.expert.weights.fingerprint}
        self.key = key | {"items": items, "answers": answers}
        of_inputs = CACHE / "activations" / f"{of}-{name}-{self.expert.weights.fingerprint[-12:]}"
        of_inputs.mkdir(parents=True, exist_ok=True)
        self.activations = StoredActivations(self.expert, zoo.calibration[name], of_inputs)
        self._reference: list[torch.Tensor] = []
        self.rows: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            stored = json.loads(self.file.read_text())
            self.rows = stored["rows"] if stored["key"] == self.key else {}

    def measure(self, row: str) -> None:
        """Fill a row and keep it."""
        started = time.monotonic()
        candidate = None if row in (BASE, EXPERT) else self._candidate(row)
        model = build_model(
            self.base if row == BASE else candidate.weights if candidate else self.expert.weights,
            torch.device("cpu"),
            torch.float32,
        )
        if not self._reference:
            full = model if row == EXPERT else build_model(self.expert.weights, torch.device("cpu"), torch.float32)
            self._reference = reference_logits(full, self.items)
        sums = sums_by_item(compare(self._reference, model, self.items))
        run = exact_match(
            model,
            self.expert.tokenizer,
            self.data,
            self.encoded,
            ends=end_ids(self.expert.weights.checkpoint.source.path, self.expert.tokenizer),
            most=group.MAX_NEW_TOKENS,
            context=context_length(self.expert.weights),
            answer_of=lambda number, text: outcome(self.lines[number], text),
        )
        self.rows[row] = {
            "nbytes": candidate.nbytes() if candidate else 0 if row == BASE else self.expert.weights.checkpoint.nbytes,
            "sums": sums,
            "right": [document.scores[EXACT_MATCH] for document in run.documents],
            "answers": [document.answer for document in run.documents],
            "seconds": round(time.monotonic() - started, 1),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps({"key": self.key, "machine": describe(), "rows": self.rows}).encode())

    def _candidate(self, row: str) -> Any:
        return baseline_candidate(row, self.base, self.expert, self.activations, several=False)


def _encoded(data: Any, expert: Expert, answers: int) -> EncodedSet:
    return encode_set(
        data,
        expert.tokenizer,
        vocabulary=expert.weights.architecture.vocabulary,
        context=context_length(expert.weights),
        limit=answers,
    )


def label(row: str) -> str:
    """What a page calls a row: the options of `meswitch compress`, or the method of `meswitch eval --baseline`."""
    return DEFAULTS.get(row) or OPTIONS.get(row) or row


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
        same = sum(ours == theirs for ours, theirs in zip(row["answers"], full["answers"], strict=True))
        change = found.difference
        value, low, high = (100 * part for part in (change.value, change.low, change.high))
        line += [f"{100 * same / len(row['answers']):.1f}", f"−{found.lost} +{found.gained}"]
        lines.append([*line, f"{value:.1f} [{low:.1f}, {high:.1f}]", f"{100 * found.minimum_detectable_effect:.1f}"])
    return lines


def page(folder: Path, cache: Path | None = None) -> str:
    """The page of what `folder` has of the groups' experts, each with what its delta is."""
    parts = [INTRODUCTION.read_text()]
    for of in ROWS_OF:
        for name in group.GROUPS[of]:
            file, figures = folder / f"{name}.json", group.group_at(of, cache).figures_file(name)
            if file.exists():
                described = _described(json.loads(figures.read_text())) if figures.exists() else ""
                parts.append(_section(f"{of}: {name}", json.loads(file.read_text()), described))
    return "".join(parts)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=list(ROWS_OF), default="strong")
    parser.add_argument("--experts", help="names, with commas between them; all of the group")
    parser.add_argument("--rows", type=int, help="measure only so many of the first rows")
    parser.add_argument("--short", action="store_true", help="the ten rows of the other kinds, for a strong expert too")
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--measured", type=Path, default=CACHE / "strong")
    parser.add_argument("--report", action="store_true", help="write the page from what was measured")
    arguments = parser.parse_args()
    if arguments.report:
        PAGE.write_text(page(arguments.measured))
        plot(json.loads((arguments.measured / "maths.json").read_text())["rows"], PICTURE)
        print(PAGE)
        return
    of = arguments.group
    wanted = arguments.experts.split(",") if arguments.experts else list(group.GROUPS[of])
    for name in wanted:
        if not group.group_at(of).figures_file(name).exists():
            print(f"{name}: not built; python tests zoo build --group {of} --expert {name}", flush=True)
            continue
        bench = Bench(of, name, arguments.items, arguments.answers, arguments.measured)
        for row in (KIND_ROWS if arguments.short else ROWS_OF[of])[: arguments.rows]:
            if row not in bench.rows:
                bench.measure(row)
            shown = {key: bench.rows[key] for key in (BASE, EXPERT, row) if key in bench.rows}
            line = next(line for line in table(shown) if line[0] == label(row))
            print(f"{name}: {' | '.join(line)} ({bench.rows[row]['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
