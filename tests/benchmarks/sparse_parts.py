"""Which part of a code makes the noise on a sparse update: linears and embedding coded alone and together.

    python tests bench sparse_parts [--expert reinforced] [--set choice] [--only TEXT] [--forms LINEARS+EMBEDDING ...]

A form says how linears and how the embedding are coded: `own` keeps the expert's, else settings as `bits=2,rank=16`.
Norms are the expert's own, as they are in every artifact. `default` is what `compress` stores without options, and
`served` what an engine makes of that. Each row is kept beside the zoo as soon as it is measured.
Prints rows for docs/results/sparse.md; the choice items choose, the report items tell what was chosen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.activations import StoredActivations
from benchmarks.compression import answered, encoded
from benchmarks.machine import describe
from meswitch_cli.artifact.coding import coded
from meswitch_cli.artifact.disk import write_atomically
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.evaluation.prompts import read_set
from meswitch_cli.evaluation.subjects import open_experts
from meswitch_cli.library.artifacts import compress
from meswitch_cli.model.build import build_model
from meswitch_cli.model.matching import PlannedTensor, make_plan
from meswitch_cli.model.weights import CheckpointWeights
from zoo import group
from zoo.compare import compare, reference_logits, sums_by_item
from zoo.item import read_items

CACHE = Path.home() / ".cache" / "meswitch-zoo"
OWN, BASE = "own", "base"
ONE = "bits=1,rank=16,channel_scale=rms,salient=8"
FORMS = (
    f"{OWN}+bits=2",
    f"{ONE}+{OWN}",
    f"bits=1,rank=16,salient=8+{OWN}",
    f"bits=1,rank=16,salient=8,factor_bits=16+{OWN}",
    f"bits=1,code=trellis,rank=16,salient=8+{OWN}",
    f"bits=0.25,code=trellis,rank=16,salient=8+{OWN}",
    f"bits=2,salient=8+{OWN}",
    f"bits=2,rank=16,salient=8+{OWN}",
    f"bits=2,rank=16,salient=8,factor_bits=8+{OWN}",
    f"bits=4,salient=8+{OWN}",
    f"bits=4,group_size=32,steps=unbiased+{OWN}",
    f"bits=4,rank=16,steps=unbiased+{OWN}",
    f"bits=4,rank=16,steps=unbiased,factor_bits=16+{OWN}",
    f"bits=2,rank=16,steps=unbiased,factor_bits=16+{OWN}",
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


class ServedWeights:
    """What an engine makes of the artifact that `compress` writes without options, or `restore` where `exactly`."""

    def __init__(self, bench: Bench, *, exactly: bool) -> None:
        self.name, self.config = "served", bench.expert.weights.config
        self.architecture, self.buffers = bench.expert.weights.architecture, bench.expert.weights.buffers
        self._base = bench.base
        with tempfile.TemporaryDirectory() as folder:
            sources = (bench.base.checkpoint.source.path, bench.expert.weights.checkpoint.source.path)
            artifact = compress(*sources, Path(folder) / "artifact")
            print(f"{artifact.manifest.nbytes:,} bytes, settings {dict(artifact.manifest.settings)}", flush=True)
            self.nbytes = artifact.manifest.nbytes
            self._entries = {entry.name: entry for entry in artifact.manifest.tensors}
            self._own = {}
            if exactly:
                for name, entry in self._entries.items():
                    self._own[name] = artifact.expert_tensor(entry, bench.base.read(entry.base))
                return
            stored = coded(artifact, artifact.read_all(), bench.base)
            self.nbytes = sum(delta.nbytes for delta in stored.values())
        for name, delta in stored.items():
            value = delta.value
            self._own[name] = bench.base.read(name).float() + dequantize(delta) if value is None else value

    def read(self, name: str) -> torch.Tensor:
        name = self.architecture.parameters[name].tied_to or name
        return self._own[name] if name in self._own else self._base.read(name)


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
        self.encoded = encoded(self.data, self.expert, max(items, answers))
        self.items = self.encoded.items[:items]
        self._full: list[torch.Tensor] = []

    def weights(self, form: str) -> CodedWeights | ServedWeights:
        if form in ("default", "served"):
            return ServedWeights(self, exactly=form == "default")
        return CodedWeights(self, form)

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
        run = answered(model, self.expert, self.data, self.encoded, self.lines)
        return [document.answer for document in run.documents]


def known_rows(bench: Bench, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows of base and full expert, where `bench compression` measured them on the same items."""
    file = CACHE / "compression" / f"{options.expert}.json"
    if options.set != "report" or not file.exists():
        return {}
    stored = json.loads(file.read_text())
    key = {"base": bench.base.fingerprint, "expert": bench.expert.weights.fingerprint}
    if stored["key"] != key | {"items": options.items, "answers": options.answers}:
        return {}
    return {f"{OWN}+{OWN}": stored["rows"]["full expert"], f"{BASE}+{BASE}": stored["rows"]["base"]}


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
    known = known_rows(bench, options)
    prefix = f"{options.expert}/{options.set}/{len(bench.items)}/{len(bench.lines)}/"
    for form in (f"{OWN}+{OWN}", f"{BASE}+{BASE}", *options.forms):
        started = time.monotonic()
        if form in known:
            kept.setdefault(prefix + form, known[form])
        if prefix + form not in kept:
            weights = bench.weights(form)
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
