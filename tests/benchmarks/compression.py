"""Defaults, their neighbours and every other method on fine-tunes: writes docs/results/compression.md.

    python tests bench compression [--group kinds] [--experts code] [--rows 2] [--items 32] [--answers 200] [--report]

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

import meswitch_cli as meswitch
from benchmarks.activations import StoredActivations
from benchmarks.compression_report import page, plot, table
from benchmarks.compression_rows import BASE, BY_ITSELF, EXPERT, KIND_ROWS, ROWS, ROWS_OF, label
from benchmarks.machine import describe
from meswitch_cli.artifact.disk import write_atomically
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.evaluation.baselines.model import baseline_candidate
from meswitch_cli.evaluation.exact_match import exact_match
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.evaluation.figures import EXACT_MATCH
from meswitch_cli.evaluation.prompts import EncodedSet, EvaluationSet, encode_set, read_set
from meswitch_cli.evaluation.subjects import Candidate, Expert, open_artifact, open_experts
from meswitch_cli.evaluation.tasks import TaskRun
from meswitch_cli.model.build import build_model
from meswitch_cli.model.matching import make_plan
from meswitch_cli.model.tokenizer import end_ids
from meswitch_cli.model.weights import CheckpointWeights, context_length
from zoo import group
from zoo.compare import compare, reference_logits, sums_by_item
from zoo.item import read_items
from zoo.skills import outcome

PAGE = Path(__file__).parents[2] / "docs" / "results" / "compression.md"
PICTURE = PAGE.parents[1] / "images" / "frontier.svg"
CACHE = Path.home() / ".cache" / "meswitch-zoo"


class BaseWithAddedRows:
    """The base, and the expert's rows of tokens that the base does not have: what every method stores as they are."""

    def __init__(self, base: CheckpointWeights, expert: Expert) -> None:
        self.name, self.config = "base", expert.weights.config
        self.architecture, self.buffers = expert.weights.architecture, expert.weights.buffers
        self._base, self._expert = base.checkpoint, expert.weights.checkpoint
        self._planned = {item.name: item for item in make_plan(self._base, self._expert).tensors}

    def read(self, name: str) -> torch.Tensor:
        item = self._planned[self.architecture.parameters[name].tied_to or name]
        value = item.base.read(self._base)
        if item.kind == "dense":
            return value
        return torch.cat([value[: item.shared_rows], item.expert.read(self._expert)[item.shared_rows :]])


class Bench:
    """One expert of a group: its items, its full model's logits and answers, and what was measured."""

    def __init__(self, of: str, name: str, items: int, answers: int, folder: Path) -> None:
        zoo = group.group_at(of)
        self.name, self.file = name, folder / f"{name}.json"
        self.base = CheckpointWeights(Checkpoint.open(str(zoo.base)))
        (self.expert,) = open_experts([f"{name}={zoo.experts[name]}"], self.base)
        self.lines = read_items(zoo.items_file(name, "report"))[:answers]
        self.data = read_set(zoo.items_file(name, "report"))
        self.encoded = encoded(self.data, self.expert, answers)
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
        whole = BaseWithAddedRows(self.base, self.expert) if row == BASE else self.expert.weights
        model = build_model(candidate.weights if candidate else whole, torch.device("cpu"), torch.float32)
        if not self._reference:
            full = model if row == EXPERT else build_model(self.expert.weights, torch.device("cpu"), torch.float32)
            self._reference = reference_logits(full, self.items)
        sums = sums_by_item(compare(self._reference, model, self.items))
        run = answered(model, self.expert, self.data, self.encoded, self.lines)
        self.rows[row] = {
            "nbytes": candidate.nbytes() if candidate else 0 if row == BASE else self.expert.weights.checkpoint.nbytes,
            "sums": sums,
            "right": [document.scores[EXACT_MATCH] for document in run.documents],
            "answers": [document.answer for document in run.documents],
            "seconds": round(time.monotonic() - started, 1),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps({"key": self.key, "machine": describe(), "rows": self.rows}).encode())

    def _candidate(self, row: str) -> Candidate:
        made, _, option = row.partition(":")
        if made == BY_ITSELF:
            base, expert = (weights.checkpoint.source.path for weights in (self.base, self.expert.weights))
            out = CACHE / "compressed" / self.name
            name, _, value = option.partition("=")
            meswitch.compress(base, expert, out, force=True, **({name: int(value)} if option else {}))
            return open_artifact(out, self.base, [self.expert], [])
        return baseline_candidate(row, self.base, self.expert, self.activations, several=False)


def answered(
    model: Any, expert: Expert, data: EvaluationSet, items: EncodedSet, lines: Sequence[Mapping[str, str]]
) -> TaskRun:
    """A model's greedy answers to an expert's items, of which `lines` are the same as they are stored."""
    return exact_match(
        model,
        expert.tokenizer,
        data,
        items,
        ends=end_ids(expert.weights.checkpoint.source.path, expert.tokenizer),
        most=group.MAX_NEW_TOKENS,
        context=context_length(expert.weights),
        answer_of=lambda number, text: outcome(lines[number], text),
    )


def encoded(data: EvaluationSet, expert: Expert, answers: int) -> EncodedSet:
    return encode_set(
        data,
        expert.tokenizer,
        vocabulary=expert.weights.architecture.vocabulary,
        context=context_length(expert.weights),
        limit=answers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=list(ROWS_OF), default="strong")
    parser.add_argument("--experts", help="names, with commas between them; all of the group")
    parser.add_argument("--rows", type=int, help="measure only so many of the first rows")
    parser.add_argument("--row", action="append", choices=ROWS, help="measure only this row, and others so named")
    parser.add_argument("--short", action="store_true", help="the ten rows of the other kinds, for a strong expert too")
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--measured", type=Path, default=CACHE / "compression")
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
        for row in arguments.row or (KIND_ROWS if arguments.short else ROWS_OF[of])[: arguments.rows]:
            if row not in bench.rows:
                bench.measure(row)
            shown = {key: bench.rows[key] for key in (BASE, EXPERT, row) if key in bench.rows}
            line = next(line for line in table(shown) if line[0] == label(row))
            print(f"{name}: {' | '.join(line)} ({bench.rows[row]['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
