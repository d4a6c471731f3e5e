"""Which part of a code makes the noise on a sparse update: linears and embedding coded alone and together.

    python tests bench sparse_parts [--expert reinforced] [--set choice] [--only TEXT] [--forms LINEARS+EMBEDDING ...]

A form says how linears and how the embedding are coded: `own` keeps the expert's, else settings as `bits=2,rank=16`.
Norms are the expert's own, as they are in every artifact. Each row is kept beside the zoo as soon as it is measured.
Prints rows for docs/results/sparse.md; the choice items choose, the report items tell what was chosen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.activations import StoredActivations
from benchmarks.machine import describe
from meswitch_cli.artifact.disk import write_atomically
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.evaluation.exact_match import exact_match
from meswitch_cli.evaluation.prompts import encode_set, read_set
from meswitch_cli.evaluation.subjects import open_experts
from meswitch_cli.model.build import build_model
from meswitch_cli.model.matching import PlannedTensor, make_plan
from meswitch_cli.model.tokenizer import end_ids
from meswitch_cli.model.weights import CheckpointWeights, context_length
from zoo import group
from zoo.compare import compare, reference_logits, sums_by_item
from zoo.item import read_items
from zoo.skills import outcome

CACHE = Path.home() / ".cache" / "meswitch-zoo"
OWN, BASE = "own", "base"
#: Settings of linears as `compress --bits` takes them, and of the embedding beside them.
ONE = "bits=1,rank=16,channel_scale=rms,salient=8"
FORMS = (
    f"{BASE}+{BASE}",
    f"{ONE}+bits=2",
    f"{ONE}+{OWN}",
    f"{OWN}+bits=2",
    "bits=2,salient=8+bits=2",
    f"bits=2,salient=8+{OWN}",
    f"bits=2,salient=8,rank=16+{OWN}",
    "bits=2,salient=8,rank=16+bits=2",
    "bits=4,salient=8+bits=4",
    f"bits=4,salient=8+{OWN}",
    f"bits=4,salient=8,rank=16+{OWN}",
    f"{OWN}+bits=4",
    "bits=4,group_size=32+bits=4,group_size=32",
)


def settings_of(text: str) -> QuantizerSettings:
    """`bits=2,rank=16` as settings; steps are output-unbiased, nothing is salient unless it says so."""
    given: dict[str, Any] = {"steps": "output-unbiased", "salient": 0}
    for part in text.split(","):
        name, _, value = part.partition("=")
        given[name] = value if name in ("code", "channel_scale", "steps", "rounding") else float(value)
    whole = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in given.items()
    }
    return QuantizerSettings(**whole)


class CodedWeights:
    """The expert with its linears and its embedding coded as a form says."""

    def __init__(self, bench: Bench, form: str) -> None:
        linears, _, embedding = form.partition("+")
        self.name, self.config = form, bench.expert.weights.config
        self.architecture = bench.expert.weights.architecture
        self.buffers = bench.expert.weights.buffers
        self.nbytes = 0
        self._bench, self._forms = bench, {"linear": linears, "embedding": embedding or linears, "head": embedding}
        self._made: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        name = self.architecture.parameters[name].tied_to or name
        item = self._bench.planned[name]
        form = self._forms.get(item.kind, OWN)
        if form == OWN:
            return item.expert.read(self._bench.expert.weights.checkpoint)
        if form == BASE:
            return item.base.read(self._bench.base.checkpoint)
        value, nbytes = self._bench.coded(name, form)
        self.nbytes += nbytes
        return value


class Bench:
    """An expert, what it answers, and what its tensors become."""

    def __init__(self, of: str, name: str, which: str, items: int, answers: int) -> None:
        zoo = group.group_at(of)
        self.base = CheckpointWeights(Checkpoint.open(str(zoo.base)))
        (self.expert,) = open_experts([f"{name}={zoo.experts[name]}"], self.base)
        plan = make_plan(self.base.checkpoint, self.expert.weights.checkpoint)
        self.planned: Mapping[str, PlannedTensor] = {item.name: item for item in plan.tensors}
        folder = CACHE / "activations" / f"{of}-{name}-{self.expert.weights.fingerprint[-12:]}"
        folder.mkdir(parents=True, exist_ok=True)
        activations = StoredActivations(self.expert, zoo.calibration[name], folder)
        self.statistics = activations.measure("random", gram=False)
        self.lines = read_items(zoo.items_file(name, which))[:answers]
        self.data = read_set(zoo.items_file(name, which))
        self.encoded = encode_set(
            self.data,
            self.expert.tokenizer,
            vocabulary=self.expert.weights.architecture.vocabulary,
            context=context_length(self.expert.weights),
            limit=max(items, answers),
        )
        self.items = self.encoded.items[:items]
        self._full: list[torch.Tensor] = []

    def model(self, weights: Any) -> Any:
        return build_model(weights, torch.device("cpu"), torch.float32)

    def coded(self, name: str, form: str) -> tuple[torch.Tensor, int]:
        item = self.planned[name]
        base = item.base.read(self.base.checkpoint)
        found = quantize(
            base, item.expert.read(self.expert.weights.checkpoint), settings_of(form), self.statistics.get(name)
        )
        return (base.float() + dequantize(found[0]), found[0].nbytes) if found else (base, 0)

    def measure(self, weights: Any) -> dict[str, Any]:
        """Sums of KL by item, and the answers, of a model of these weights."""
        if not self._full:
            self._full = reference_logits(self.model(self.expert.weights), self.items)
        model = self.model(weights)
        return {
            "sums": sums_by_item(compare(self._full, model, self.items)),
            "answers": self.answers(model) if self.lines else [],
        }

    def answers(self, model: Any) -> list[str]:
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
        return [document.answer for document in run.documents]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", default="kinds")
    parser.add_argument("--expert", default="reinforced")
    parser.add_argument("--set", choices=["choice", "report"], default="choice")
    parser.add_argument("--items", type=int, default=32)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--forms", nargs="*", default=FORMS)
    parser.add_argument("--measured", type=Path, default=CACHE / "sparse_parts.json")
    options = parser.parse_args()
    file: Path = options.measured
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    bench = Bench(options.group, options.expert, options.set, options.items, options.answers)
    prefix = f"{options.expert}/{options.set}/{len(bench.items)}/{len(bench.lines)}/"
    for form in (f"{OWN}+{OWN}", f"{BASE}+{BASE}", *options.forms):
        started = time.monotonic()
        if prefix + form not in kept:
            weights = CodedWeights(bench, form)
            kept[prefix + form] = bench.measure(weights) | {"nbytes": weights.nbytes}
            write_atomically(file, json.dumps(kept).encode())
        if form == f"{OWN}+{OWN}":
            continue
        own, base, row = (kept[prefix + name] for name in (f"{OWN}+{OWN}", f"{BASE}+{BASE}", form))
        kl, of_base = (sum(part["sums"]["kl"]) for part in (row, base))
        agreed = [ours == theirs for ours, theirs in zip(row["answers"], own["answers"], strict=True)]
        same = f"{100 * sum(agreed) / len(agreed):.1f}" if agreed else ""
        print(
            f"| {form} | {row['nbytes'] / 1e6:.1f} | {100 * kl / of_base:.4f} | {same} | "
            f"({time.monotonic() - started:.0f} s)",
            flush=True,
        )
    print(describe())


if __name__ == "__main__":
    main()
