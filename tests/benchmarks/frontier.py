"""Size against fidelity, every method at the same bytes: writes docs/results/frontier.md.

    python tests bench frontier [--experts maths] [--items 16] [--minutes 4] [--rows TEXT]

Rows are written one by one to a JSON file an expert, which is part of the repository: a later run continues where the
last stopped, as long as the zoo is the same, and the page is made from what is there. `--minutes` stops after the row
during which they ran out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import zoo
from benchmarks.artifacts import artifact_of
from benchmarks.frontier_report import write_page
from benchmarks.frontier_rows import ARTIFACTS, BASE, EXPERT, FRONTIER, rows
from benchmarks.frontier_tasks import documents, right_answers
from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.evaluation.baselines import parse_method
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.baselines.model import BaselineWeights
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.evaluation.passes import Arithmetic, Reference
from meswitch_cli.evaluation.subjects import Expert, open_experts
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights, Weights, parameter_count
from zoo.compare import sums_by_item

PAGE = Path(__file__).parents[2] / "docs" / "results" / "frontier.md"
ACTIVATIONS = Path.home() / ".cache" / "meswitch-zoo" / "activations"
ARITHMETIC = Arithmetic(torch.device("cpu"), torch.float32, "resident")
CALIBRATION_WINDOWS = 32
#: Documents of each expert's task; code has 30.
DOCUMENTS = 40
#: Rows whose right answers are counted; channels and sweeps differ too little for 40 documents to see.
WITH_TASKS = {BASE, EXPERT, *(spec for specs in FRONTIER.values() for spec in specs)}


class StoredActivations(Activations):
    """Statistics kept on disk between runs: taking them costs more than a row."""

    def __init__(self, expert: Expert, path: Path, folder: Path) -> None:
        super().__init__(expert, path, samples=CALIBRATION_WINDOWS)
        self._folder = folder

    def measure(self, source: str, *, gram: bool) -> Mapping[str, InputStatistics]:
        file = self._folder / f"{self.expert.label}-{source}-{'gram' if gram else 'energy'}.safetensors"
        if not file.exists():
            parts = {}
            for name, item in super().measure(source, gram=gram).items():
                parts |= {f"{name}|energy": item.energy, f"{name}|tokens": torch.tensor([item.tokens])}
                if item.inputs is not None:
                    parts[f"{name}|inputs"] = item.inputs.clone()
                if item.gram is not None:
                    parts[f"{name}|gram"] = item.gram.clone()  # projections of one input share theirs
            safetensors.torch.save_file(parts, file)
        stored = safetensors.torch.load_file(file)
        names = {key.partition("|")[0] for key in stored}
        return {
            name: InputStatistics(
                stored[f"{name}|energy"],
                stored.get(f"{name}|gram"),
                int(stored[f"{name}|tokens"]),
                stored.get(f"{name}|inputs"),
            )
            for name in names
        }


def encoded(expert: Expert, part: str, count: int) -> list[EncodedItem]:
    """The first items of a part, as training and scoring encode them."""
    found = (zoo.encode_item(expert.tokenizer, item) for item in zoo.items(expert.label, part)[:count])
    return [EncodedItem(tuple(ids), start) for ids, start in found]


def weights_of(
    spec: str, base: CheckpointWeights, expert: Expert, activations: Activations
) -> tuple[Weights, Callable[[], int]]:
    """A row's model, and what counts its bytes once its weights have been read."""
    if spec == BASE:
        return base, lambda: 0
    if spec == EXPERT:
        return expert.weights, lambda: expert.weights.nbytes
    if spec in ARTIFACTS:
        artifact = Artifact.open(artifact_of(expert.label, **ARTIFACTS[spec]))
        return ArtifactWeights(artifact, base), lambda: artifact.manifest.nbytes
    made = BaselineWeights(parse_method(spec), base, expert, activations)
    return made, lambda: made.nbytes


def measure(name: str, path: Path, count: int, deadline: float, wanted: str) -> None:
    """Measure an expert's missing rows until the deadline."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    todo = [spec for spec in rows() if spec not in results["rows"] and wanted in spec]
    if not todo or time.monotonic() > deadline:
        return
    family = zoo.paths()
    base = CheckpointWeights(Checkpoint.open(str(family.base)))
    expert = open_experts([f"{name}={family.experts[name]}"], base)[0]
    items = encoded(expert, "report", count)
    questions = documents(name, DOCUMENTS)
    activations = StoredActivations(expert, family.calibration[name], ACTIVATIONS)
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(expert.weights, items, ARITHMETIC, Path(folder))
        for spec in todo:
            if time.monotonic() > deadline:
                return
            started = time.perf_counter()
            weights, nbytes = weights_of(spec, base, expert, activations)
            row = {"report": sums_by_item(reference.compare(weights))}
            if spec in WITH_TASKS:
                model = build_model(weights, ARITHMETIC.device, ARITHMETIC.dtype)
                row["right"] = right_answers(model, expert.tokenizer, questions)
            row |= {
                "bytes": nbytes(),
                "seconds": round(time.perf_counter() - started, 1),
                "machine": describe(),
            }
            results["rows"][spec] = row
            results["weights"] = parameter_count(expert.weights)
            path.write_text(json.dumps(results))
            print(f"{name}: {spec}: {row['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default=",".join(zoo.EXPERTS))
    parser.add_argument("--items", type=int, default=16, help="items of the report part; nothing is chosen on them")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    parser.add_argument("--results", type=Path, default=PAGE.parent / "data" / "frontier")
    arguments = parser.parse_args()
    for folder in (arguments.results, ACTIVATIONS):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    for name in arguments.experts.split(","):
        path = arguments.results / f"{name}-{arguments.items}.json"
        measure(name, path, arguments.items, deadline, arguments.rows)
    write_page(arguments.results, PAGE)


if __name__ == "__main__":
    main()
