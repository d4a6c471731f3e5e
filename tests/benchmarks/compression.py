"""Fidelity of every compression setting on the real experts: writes docs/results/compression.md.

    python tests bench compression [--experts maths,code] [--rows 1,2] [--items 30,60]

Each expert's rows go to a JSON file as they are measured; a second run continues where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from benchmarks.artifacts import SAMPLES, SEQUENCE_LENGTH, artifact_of
from benchmarks.compression_report import write_report
from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact, expert_tensor
from meswitch_cli.artifact.shard import Shard
from meswitch_cli.calibration.data import CalibrationFile, read_calibration
from meswitch_cli.calibration.stream import stream_statistics
from meswitch_cli.compression.job import prepare
from meswitch_cli.compression.pairs import PairReader, reading_order
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.compression.unit import compress_unit
from meswitch_cli.compression.windows import calibration_windows
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.evaluation.baselines.bitdelta import bitdelta_start
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.model.weights import CheckpointWeights
from zoo.compare import compare, reference_logits, sums_by_item

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True)
class Row:
    """One setting: what the table calls it, its calibration, and how it differs from `CompressionSettings()`.

    `calibration` is True for the expert's data, `RANDOM` for random tokens, False for none.
    """

    label: str
    calibration: bool | str
    settings: Mapping[str, Any]


def _row(label: str, calibration: bool | str = False, **settings: Any) -> Row:
    return Row(label, calibration, settings)


#: Fixed before any of them was measured. The first two are not CompressionSettings: see `deltas_of`.
ROWS = (
    _row("base"),
    _row("1 bit, sign x matrix mean (BitDelta's start)"),
    _row("2 bits, least squares", salient=0, steps="least-squares"),
    _row("2 bits, least squares, channel scale", salient=0, steps="least-squares", channel_scale="rms"),
    _row("2 bits, unbiased", salient=0),
    _row("2 bits, unbiased, channel scale", salient=0, channel_scale="rms"),
    _row("2 bits, least squares, 8 salient, calibrated (the paper's, undistilled)", True, steps="least-squares"),
    _row("2 bits, unbiased, 8 salient, data-free"),
    _row("2 bits, unbiased, 8 salient, calibrated", True),
    _row("2 bits, unbiased, 8 salient, channel scale, calibrated", True, channel_scale="rms"),
    _row("2 bits, layer-wise, 8 salient", True, steps="layerwise"),
    _row("2 bits, error feedback, least squares, 8 salient", True, steps="least-squares", rounding="feedback"),
    _row("2 bits, error feedback, unbiased, 8 salient", True, rounding="feedback"),
    _row("2 bits, distilled, 8 salient", True, steps="distill"),
    _row("1 bit, least squares, 8 salient, calibrated", True, bits=1, steps="least-squares"),
    _row("1 bit, unbiased", bits=1, salient=0),
    _row("1 bit, unbiased, 8 salient, data-free", bits=1),
    _row("1 bit, unbiased, 8 salient, calibrated", True, bits=1),
    _row("1 bit, unbiased, 8 salient, channel scale, data-free", bits=1, channel_scale="rms"),
    _row("1 bit, unbiased, 8 salient, channel scale, calibrated", True, bits=1, channel_scale="rms"),
    _row("1 bit, layer-wise, 8 salient", True, bits=1, steps="layerwise"),
    _row("1 bit, distilled, 8 salient", True, bits=1, steps="distill"),
    _row("1 bit, distilled, 8 salient, channel scale", True, bits=1, steps="distill", channel_scale="rms"),
    _row("4 bits, unbiased, 8 salient, data-free", bits=4, embedding_bits=4),
    # Added after the rows above were measured, for the two figures of code that fell short.
    _row("2 bits, unbiased, 8 salient, data-free, embedding 4 bits", embedding_bits=4),
    _row("2 bits, unbiased, 8 salient, data-free, groups of 64", group_size=64),
    _row("2 bits, unbiased, 8 salient, data-free, groups of 64, embedding 4 bits", group_size=64, embedding_bits=4),
    _row("1 bit, layer-wise, 8 salient, channel scale", True, bits=1, steps="layerwise", channel_scale="rms"),
    _row("1 bit, unbiased, 32 salient, channel scale, calibrated", True, bits=1, salient=32, channel_scale="rms"),
    _row(
        "1 bit, unbiased, 8 salient, channel scale, calibrated, embedding 4 bits",
        True,
        bits=1,
        channel_scale="rms",
        embedding_bits=4,
    ),
    _row("2 bits, unbiased, 8 salient, random tokens", RANDOM),
    _row("2 bits, unbiased, 16 salient, random tokens", RANDOM, salient=16),
    _row("2 bits, unbiased, 8 salient, random tokens, embedding 4 bits", RANDOM, embedding_bits=4),
    _row("1 bit, unbiased, 8 salient, channel scale, random tokens", RANDOM, bits=1, channel_scale="rms"),
    # Added last: the unbiased step in the inputs' metric, chosen on the choice items.
    _row("2 bits, output-unbiased, 8 salient, random tokens", RANDOM, steps="output-unbiased"),
    _row("2 bits, output-unbiased, 8 salient, calibrated", True, steps="output-unbiased"),
    _row(
        "1 bit, output-unbiased, 8 salient, channel scale, random tokens",
        RANDOM,
        bits=1,
        channel_scale="rms",
        steps="output-unbiased",
    ),
    _row(
        "1 bit, output-unbiased, 8 salient, channel scale, calibrated",
        True,
        bits=1,
        channel_scale="rms",
        steps="output-unbiased",
    ),
    # The low-rank part, how it is fitted chosen on the choice items.
    _row(
        "1 bit, output-unbiased, 8 salient, channel scale, rank 16, random tokens (the default at 1 bit)",
        RANDOM,
        bits=1,
        channel_scale="rms",
        steps="output-unbiased",
        rank=16,
    ),
    _row("2 bits, output-unbiased, 8 salient, rank 16, random tokens", RANDOM, steps="output-unbiased", rank=16),
)


class Bench:
    """One expert with everything that its rows share: models, statistics, reference logits."""

    def __init__(self, name: str, items: tuple[int, int], scratch: Path) -> None:
        family = zoo.paths()
        self.name, self.scratch = name, scratch
        self.base_path, self.expert_path = str(family.base), str(family.experts[name])
        self.calibration: CalibrationFile = read_calibration(family.calibration[name])
        tokenizer = AutoTokenizer.from_pretrained(self.expert_path)
        self.parts = {
            part: [
                EncodedItem(tuple(ids), start)
                for ids, start in (zoo.encode_item(tokenizer, item) for item in zoo.items(name, part)[:count])
            ]
            for part, count in zip(("choice", "report"), items, strict=True)
        }
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.expert_path, dtype=torch.float32).eval()
        self.items = [item for part in self.parts.values() for item in part]
        self.reference = reference_logits(self.model, self.items)
        self._statistics: dict[bool | str, dict[int, dict[str, InputStatistics]]] = {}

    def job(self, row: Row, out: Path) -> Job:
        file = self.calibration if row.calibration is True else None
        settings = CompressionSettings(
            **row.settings,
            calibration=file.sha256 if file else row.calibration or None,
            samples=SAMPLES,
            sequence_length=SEQUENCE_LENGTH,
        )
        return prepare(self.base_path, self.expert_path, out, settings, file)

    def statistics(self, job: Job, calibration: bool | str) -> dict[int, dict[str, InputStatistics]]:
        """Statistics of every layer, with gram matrices for the expert's data, taken once for all rows of a kind."""
        if calibration not in self._statistics:
            weights, windows = CheckpointWeights(job.expert), calibration_windows(job)
            self._statistics[calibration] = dict(
                stream_statistics(weights, windows, gram=calibration is True, keep=calibration == RANDOM)
            )
        return self._statistics[calibration]

    def weights_of(self, row: Row) -> tuple[dict[str, torch.Tensor], int]:
        """The row's weights by parameter name, and the bytes of its shards."""
        job = self.job(row, self.scratch / "artifact")
        if row.label == "base":
            return {item.name: item.base.read(job.base).float() for item in job.plan.tensors}, 0
        if row.label.startswith("1 bit, sign"):
            return _bitdelta(job)
        if job.settings.steps == "distill":
            artifact = Artifact.open(artifact_of(self.name, calibrated=True, **row.settings))
            entries = {entry.name: entry for entry in artifact.manifest.tensors}
            return {
                item.name: artifact.expert_tensor(entries[item.name], item.base.read(job.base))
                if item.name in entries
                else item.base.read(job.base).float()
                for item in job.plan.tensors
            }, artifact.manifest.nbytes
        statistics = self.statistics(job, row.calibration) if row.calibration else {}
        weights: dict[str, torch.Tensor] = {}
        nbytes = 0
        for index, unit in enumerate(job.plan.units):
            known = statistics.get(index, {})
            with PairReader(job.base, job.expert, reading_order([unit], [0], calibrated=False)) as reader:
                pairs = [reader.pair(item) for item in unit]
            data, record = compress_unit(iter(pairs), "shard", job.settings_of, known, "cpu")
            path = self.scratch / "shard"
            path.write_bytes(data)
            nbytes += len(data)
            shard = Shard(path, list(record.tensors))
            entries = {entry.name: entry for entry in record.tensors}
            for pair in pairs:
                name = pair.planned.name
                weights[name] = expert_tensor(shard, entries[name], pair.base) if name in entries else pair.base.float()
        return weights, nbytes

    def measure(self, row: Row) -> dict[str, Any]:
        started = time.perf_counter()
        weights, nbytes = self.weights_of(row)
        made = time.perf_counter()
        with torch.no_grad():
            for name, value in weights.items():
                self.model.get_parameter(name).copy_(value)
        figures = compare(self.reference, self.model, self.items)
        split = len(self.parts["choice"])
        return {
            "label": row.label,
            "bytes": nbytes,
            "compress_seconds": round(made - started, 1),
            "evaluate_seconds": round(time.perf_counter() - made, 1),
            "choice": sums_by_item(figures[:split]),
            "report": sums_by_item(figures[split:]),
        }

    def expert_row(self) -> dict[str, Any]:
        figures = compare(self.reference, self.model, self.items)
        split = len(self.parts["choice"])
        return {
            "label": "full expert",
            "bytes": sum(value.numel() * 2 for value in self.model.parameters()),
            "choice": sums_by_item(figures[:split]),
            "report": sums_by_item(figures[split:]),
        }


def _bitdelta(job: Job) -> tuple[dict[str, torch.Tensor], int]:
    """BitDelta before distillation: linears at one bit, everything else the expert's, as its authors do."""
    weights: dict[str, torch.Tensor] = {}
    nbytes = 0
    for item in job.plan.tensors:
        base, expert = item.base.read(job.base).float(), item.expert.read(job.expert).float()
        weights[item.name] = base + bitdelta_start(expert - base) if item.kind == "linear" else expert
        nbytes += expert.numel() // 8 + 2 if item.kind == "linear" else 2 * expert.numel()
    return weights, nbytes


def measured(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"machine": describe(), "rows": []}


def rows_to_do(done: list[dict[str, Any]], wanted: Callable[[int], bool]) -> Iterator[Row]:
    labels = {row["label"] for row in done}
    for index, row in enumerate(ROWS):
        if row.label not in labels and wanted(index):
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", default=",".join(zoo.EXPERTS))
    parser.add_argument("--rows", default="", help="indices into ROWS; all by default")
    parser.add_argument("--items", default="30,60", help="items of the choice and of the report part")
    parser.add_argument("--results", type=Path, default=Path.home() / ".cache" / "meswitch-zoo" / "compression")
    arguments = parser.parse_args()
    chosen = {int(index) for index in arguments.rows.split(",") if index}
    choice, report = (int(count) for count in arguments.items.split(","))
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name in arguments.experts.split(","):
        path = arguments.results / f"{name}.json"
        results = measured(path)
        todo = list(rows_to_do(results["rows"], lambda index: not chosen or index in chosen))
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(name, (choice, report), Path(scratch))
            if not results["rows"]:
                results["rows"].append(bench.expert_row())
                path.write_text(json.dumps(results))
            for row in todo:
                figures = bench.measure(row)
                results["rows"] = measured(path)["rows"] + [figures]  # another run may have added rows meanwhile
                path.write_text(json.dumps(results))
                print(f"{name}: {row.label}: {figures['evaluate_seconds']} s", flush=True)
    write_report(arguments.results, RESULTS / "compression.md", [row.label for row in ROWS])


if __name__ == "__main__":
    main()
