"""Trellis codes measured: noise, seconds, and what they leave of strong experts. Writes docs/results/trellis.md.

    python tests bench trellis [--zoo FOLDER] [--experts code logic] [--items 100] [--kl-items 40] [--codes]

Rows of an expert are written one by one to docs/results/data/trellis, and the page is made from what is there: a later
run goes on where the last stopped. `--codes` measures the codes themselves instead.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe
from benchmarks.trellis_report import write_page
from benchmarks.trellis_taps import gaussian, noise
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.delta.codes import TRELLIS_CODES
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.model.weights import CheckpointWeights
from zoo.cache import Zoo, folder_at
from zoo.compare import compare, reference_logits
from zoo.encoding import encode_item
from zoo.generation import greedy_texts
from zoo.item import read_items
from zoo.skills import outcome

RESULTS = Path(__file__).parents[2] / "docs" / "results"
DATA = RESULTS / "data" / "trellis"
MAX_NEW_TOKENS = 64
#: Rows and columns of the tensor that is timed.
SHAPE = (1024, 4096)


@dataclass(frozen=True)
class Row:
    """A way to compress; `answers` whether greedy answers are compared too."""

    name: str
    settings: Mapping[str, Any]
    answers: bool = field(default=True)


_SPARE = {"salient": 0, "steps": "unbiased"}
#: What embedding and head had in all rows, before there were trellis codes and directions for them.
_EMBEDDING = {"embedding_bits": 2, "embedding_rank": 0}
ROWS = (
    Row("0.25 bit", {"bits": 0.25}),
    Row("1 bit, scalar", {"bits": 1}),
    Row("1 bit, trellis", {"bits": 1, "code": "trellis"}),
    Row("0.5 bit", {"bits": 0.5}),
    Row("0.125 bit", {"bits": 0.125}),
    Row("2 bits, scalar", {"bits": 2}),
    Row("0.25 bit, no salient channels", {"bits": 0.25, "salient": 0}, answers=False),
    Row("0.25 bit, unbiased steps", {"bits": 0.25, "steps": "unbiased"}, answers=False),
    Row("0.25 bit, neither", {"bits": 0.25} | _SPARE, answers=False),
    Row("0.25 bit, channel scale", {"bits": 0.25, "channel_scale": "rms"}, answers=False),
    Row("0.25 bit, rank 0", {"bits": 0.25, "rank": 0}, answers=False),
    Row("2 bits, scalar, rank 16", {"bits": 2, "rank": 16}, answers=False),
)
#: Further rows, by the option that asks for them; their data are apart, because they have fewer items.
SETS = {
    "embedding": (
        *(
            Row(f"{bits} bit", {"bits": 0.25, "embedding_bits": bits}, answers=False)
            for bits in (2, 1, 0.5, 0.25, 0.125)
        ),
        *(
            Row(
                f"{bits} bit, {rank} directions",
                {"bits": 0.25, "embedding_bits": bits, "embedding_rank": rank},
                answers=False,
            )
            for bits, rank in ((1, 16), (0.5, 16), (0.25, 16), (0.125, 16), (0.25, 8), (0.125, 32))
        ),
        Row(
            "0.25 bit, 16 directions of 4 bits",
            {"bits": 0.25, "embedding_bits": 0.25, "embedding_rank": 16, "factor_bits": 4},
            answers=False,
        ),
    ),
    "size": tuple(Row(f"{size} MB", {"size": int(size * 1e6)}, answers=False) for size in (13.18, 11.42, 8.1)),
}


class Bench:
    """One expert's report items, and one model whose weights are changed in place."""

    def __init__(self, zoo: Zoo, name: str, count: int, kl_count: int) -> None:
        self.zoo, self.name = zoo, name
        self.machine = described()  # of the code that is loaded, not of what the folder holds when a row ends
        self.base, self.expert = (CheckpointWeights(Checkpoint.open(str(path))) for path in self.paths)
        self.tokenizer = AutoTokenizer.from_pretrained(self.paths[1])
        self.items = [item for item in read_items(zoo.items_file(name, "report")) if item["answer"]][:count]
        self.encoded = [EncodedItem(tuple(ids), start) for ids, start in self._encoded()[:kl_count]]
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.paths[1], dtype=torch.float32).eval()
        self.reference = reference_logits(self.model, self.encoded)

    @cached_property
    def texts(self) -> list[str]:
        """The full expert's answers; the model is left with its weights."""
        self.load(self.expert.read)
        return self.answers()

    @property
    def paths(self) -> tuple[Path, Path]:
        return self.zoo.base, self.zoo.folder / "experts" / self.name

    def _encoded(self) -> list[tuple[list[int], int]]:
        return [encode_item(self.tokenizer, item) for item in self.items]

    def load(self, read: Callable[[str], torch.Tensor], wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Give the model the weights that `read` gives of the wanted names."""
        for name, parameter in self.model.named_parameters():
            if wanted(name):
                parameter.data.copy_(read(name))

    def kl(self) -> float:
        """Mean KL to the full expert's next-token distribution over the answers, nats a token."""
        found = torch.cat([figures["kl"] for figures in compare(self.reference, self.model, self.encoded)])
        return float(found.mean())

    def answers(self) -> list[str]:
        return greedy_texts(self.model, self.tokenizer, self.items, MAX_NEW_TOKENS)

    def right(self, texts: Sequence[str]) -> int:
        return sum(outcome(item, text) == item["answer"] for item, text in zip(self.items, texts, strict=True))

    def ends(self, *, with_answers: bool, with_base: bool) -> dict[str, Any]:
        """What base and full expert do, the base's answers where they are wanted: it seldom ends one."""
        tokens = sum(len(rows) for rows in self.reference)
        result = {"items": len(self.items), "kl_items": len(self.encoded), "tokens": tokens}
        result |= {"expert_right": self.right(self.texts)} if with_answers else {}
        self.load(self.base.read)
        return result | {"base_kl": self.kl()} | ({"base_right": self.right(self.answers())} if with_base else {})

    def measure(self, row: Row) -> dict[str, Any]:
        """Compress, and compare the whole artifact and its linears alone with the full expert."""
        own_texts = self.texts if row.answers else []
        with tempfile.TemporaryDirectory() as folder:
            own = row.settings if "size" in row.settings else _EMBEDDING | dict(row.settings)
            settings = CompressionSettings.with_defaults(**own)
            wall, own = time.perf_counter(), time.process_time()
            job = prepare(str(self.paths[0]), str(self.paths[1]), Path(folder) / "artifact", settings, None)
            manifest = compress(job, keep_weak=True)
            result: dict[str, Any] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - own}
            linears = [entry for entry in manifest.tensors if entry.kind == "linear"]
            energy = sum(entry.delta_energy or 0.0 for entry in linears)
            result |= {
                "nbytes": manifest.nbytes,
                "linear_nbytes": sum(entry.nbytes for entry in linears),
                "linear_weights": sum(entry.numel for entry in linears),
                "noise": sum((entry.weight_error or 0.0) * (entry.delta_energy or 0.0) for entry in linears) / energy,
            }
            self.load(ArtifactWeights(Artifact.open(job.out), self.base).read)
        result["kl"] = self.kl()
        if row.answers:
            texts = self.answers()
            same = sum(one == other for one, other in zip(texts, own_texts, strict=True))
            result |= {"same": same, "right": self.right(texts)}
        self.load(self.expert.read, lambda name: "embed_tokens" in name or "lm_head" in name)
        return result | {"linear_kl": self.kl(), "machine": self.machine}


def described() -> str:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    vectors = next((name for name in ("avx512_bf16", "avx512f", "avx2") if name in flags), "no AVX2")
    return f"{describe()}, {vectors}"


def measure_codes() -> dict[str, Any]:
    """Noise on Gaussian and Laplacian rows, and what the quantiser takes."""
    rows = gaussian(512, 1)
    uniform = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2))
    laplacian = gaussian(512, 3).sign() * uniform.log().abs()
    result: dict[str, Any] = {"noise": [], "seconds": [], "machine": described()}
    for bits, code in TRELLIS_CODES.items():
        result["noise"].append([f"{bits} bit, trellis", bits, noise(code, rows), noise(code, laplacian)])
    for bits in (1, 2, 4):
        settings = QuantizerSettings(bits, 0)
        errors = []
        for sample in (rows, laplacian):
            found = quantize(torch.zeros_like(sample), sample, settings)
            assert found is not None
            errors.append(found[1].weight_error)
        result["noise"].append([f"{bits} bit, scalar", bits, *errors])
    base, delta = gaussian(*(SHAPE[0], 5))[:, : SHAPE[1]], 1e-2 * gaussian(SHAPE[0], 6)[:, : SHAPE[1]]
    base, expert = base.bfloat16(), (base + delta).bfloat16()
    for name, code_name, bits in (
        ("1 bit, scalar", "scalar", 1),
        *((f"{bits} bit, trellis", "trellis", bits) for bits in TRELLIS_CODES),
    ):
        row: list[Any] = [name]
        for rank in (0, 16):
            settings = QuantizerSettings(bits, 8, rank=rank, code=code_name)  # type: ignore[arg-type]
            quantize(base[:64], expert[:64], settings)
            taken = []
            for _ in range(3):
                started = time.process_time()
                quantize(base, expert, settings)
                taken.append(time.process_time() - started)
            row.append(min(taken) / base.numel())
        result["seconds"].append(row)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", type=Path, default=folder_at("strong"), help="the folder of a built zoo")
    parser.add_argument("--experts", nargs="+", default=["code", "logic"])
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--kl-items", type=int, default=40, help="items whose answers' KL is taken")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after the row during which they ran out")
    parser.add_argument("--rows", default="", help="measure only rows whose names have this text")
    parser.add_argument("--no-base-answers", action="store_true", help="leave the base's answers out: they are long")
    parser.add_argument("--set", choices=[*SETS], help="measure these further rows; their KL alone")
    parser.add_argument("--codes", action="store_true", help="measure the codes, not the experts")
    options = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    if options.codes:
        torch.set_num_threads(1)
        (DATA / "codes.json").write_text(json.dumps(measure_codes(), indent=1) + "\n")
    deadline = time.monotonic() + 60 * options.minutes
    for name in () if options.codes else options.experts:
        path = DATA / (options.set or "") / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        missing = [
            row for row in SETS.get(options.set, ROWS) if row.name not in value["rows"] and options.rows in row.name
        ]
        if not missing or time.monotonic() > deadline:
            continue
        bench = Bench(Zoo(options.zoo), name, options.items, options.kl_items)
        if "ends" not in value:
            value["ends"] = bench.ends(
                with_answers=not options.set, with_base=not (options.set or options.no_base_answers)
            )
            path.write_text(json.dumps(value, indent=1) + "\n")
        for row in missing:
            if time.monotonic() < deadline:
                value["rows"][row.name] = bench.measure(row)
                path.write_text(json.dumps(value, indent=1) + "\n")
                print(name, row.name, value["rows"][row.name], flush=True)
    write_page(DATA, RESULTS / "trellis.md")


if __name__ == "__main__":
    main()
