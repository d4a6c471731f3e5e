"""`--baseline NAME[:option=value,...]`: a method by name, and the model that its deltas make."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.calibration.data import random_window, read_calibration, token_windows
from meswitch_cli.calibration.stream import stream_statistics
from meswitch_cli.checkpoint.architecture import Architecture
from meswitch_cli.checkpoint.plan import Plan, PlannedTensor, make_plan
from meswitch_cli.delta.codes import CODES
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import UsageError
from meswitch_cli.evaluation.baselines import (
    Approximation,
    bitdelta,
    delta_come,
    low_rank,
    per_axis,
    rank_at,
    round_to_nearest,
    sparse_quantised,
)
from meswitch_cli.evaluation.distillation import ScaleTraining, distil_scales
from meswitch_cli.evaluation.model import build_model
from meswitch_cli.evaluation.saliency import salient_delta
from meswitch_cli.evaluation.subjects import Candidate, Expert
from meswitch_cli.evaluation.weights import CheckpointWeights, vocabulary_size

Value = int | float | str
#: Windows and tokens of calibration data that statistics are taken over.
SAMPLES, SEQUENCE_LENGTH = 32, 512
#: Models up to this size keep their approximated weights in memory between passes.
KEPT_BYTES = 4 << 30

#: Options of every method and their defaults. `embedding` is the code width of embedding and head, 16 to keep them.
METHODS: dict[str, dict[str, Value]] = {
    "bitdelta": {"masks": 1, "distill": 0},
    "rtn": {"bits": 2, "group": 0},
    "per-axis": {"axis": "best"},
    "low-rank": {"bits": 1.0, "rank": 0},
    "delta-come": {"bits": 1.0},
    "sparse": {"bits": 2, "group": 128},
    "meswitch": {
        "bits": 2,
        "salient": 8,
        "group": 0,
        "channel_scale": "none",
        "steps": "unbiased",
        "rank": 0,
        "saliency": "error",
        "activations": "auto",
    },
}
COMMON: dict[str, Value] = {"embedding": 2, "seed": 0}


@dataclass(frozen=True)
class Method:
    """A method with its options; `spec` is how the user wrote it."""

    spec: str
    name: str
    options: Mapping[str, Value]

    @property
    def needs_calibration(self) -> bool:
        get = self.options.get
        return get("steps") == "layerwise" or get("activations") == "file" or bool(get("distill"))

    def approximate(self, name: str, delta: torch.Tensor, statistics: InputStatistics | None) -> Approximation:
        """What the method makes of one linear's delta `[out, in]`; `name` only seeds what is random."""
        get = self.options.__getitem__
        if self.name == "bitdelta":
            return bitdelta(delta, int(get("masks")))
        if self.name == "rtn":
            return round_to_nearest(delta, int(get("bits")), int(get("group")))
        if self.name == "per-axis":
            return per_axis(delta, get("axis"))  # type: ignore[arg-type]
        if self.name == "low-rank":
            return low_rank(delta, int(get("rank")) or rank_at(delta.shape, float(get("bits"))))
        if self.name == "delta-come":
            return delta_come(delta, float(get("bits")))
        if self.name == "sparse":
            return sparse_quantised(delta, int(get("bits")), int(get("group")))
        digest = hashlib.sha256(f"{get('seed')}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return salient_delta(delta, self.quantizer(), get("saliency"), statistics, generator)  # type: ignore[arg-type]

    def quantizer(self) -> QuantizerSettings:
        """Settings of the `meswitch` method."""
        get = self.options.__getitem__
        return QuantizerSettings(
            int(get("bits")),
            int(get("salient")),
            int(get("group")),
            get("channel_scale"),  # type: ignore[arg-type]
            "nearest",
            get("steps"),  # type: ignore[arg-type]
            int(get("rank")),
        )


def parse_method(spec: str) -> Method:
    """Read `NAME[:option=value,...]`.

    Raises:
        UsageError: no such method or option, or a value that it cannot have.
    """
    name, _, rest = spec.partition(":")
    if name not in METHODS:
        raise UsageError(f"--baseline {spec}: no method {name!r}; there are {', '.join(METHODS)}")
    options = dict(METHODS[name]) | COMMON
    for part in rest.split(",") if rest else []:
        key, found, text = part.partition("=")
        if key not in options or not found:
            raise UsageError(f"--baseline {spec}: {part!r} is none of its options: {', '.join(sorted(options))}")
        try:
            options[key] = type(options[key])(text)
        except ValueError as error:
            raise UsageError(f"--baseline {spec}: {key} cannot be {text!r}") from error
    method = Method(spec, name, options)
    _check(method)
    return method


def _check(method: Method) -> None:
    allowed: dict[str, tuple[Value, ...]] = {
        "masks": (1, 2, 3, 4),
        "axis": ("row", "column", "best"),
        "saliency": ("error", "random", "magnitude", "activation"),
        "embedding": (*CODES, 16),
        "activations": ("auto", "file", "random", "none"),
    }
    for key, value in method.options.items():
        if key in allowed and value not in allowed[key]:
            raise UsageError(f"--baseline {method.spec}: {key} must be one of {', '.join(map(str, allowed[key]))}")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise UsageError(f"--baseline {method.spec}: {key} cannot be {value}")
    bits = method.options.get("bits", 1)
    if isinstance(bits, int | float) and not 0 < bits <= 8:
        raise UsageError(f"--baseline {method.spec}: bits must lie between 0 and 8")
    if method.name == "meswitch":
        if method.options["saliency"] == "activation" and method.options["activations"] == "none":
            raise UsageError(f"--baseline {method.spec}: saliency=activation needs activations")
        try:
            method.quantizer()
        except ValueError as error:
            raise UsageError(f"--baseline {method.spec}: {error}") from error


class Activations:
    """An expert's input statistics, over a calibration file or over random tokens, taken when first asked for."""

    def __init__(self, expert: Expert, path: Path | None, seed: int = 0, samples: int = SAMPLES) -> None:
        self.expert, self.path, self.seed, self.samples = expert, path, seed, samples
        self._known: dict[tuple[str, bool], Mapping[str, InputStatistics]] = {}

    def windows(self) -> torch.Tensor:
        """The calibration file as token windows `[n, length]`.

        Raises:
            CalibrationError: the file cannot be used.
        """
        assert self.path is not None
        return token_windows(
            read_calibration(self.path),
            self.expert.tokenizer,
            samples=self.samples,
            sequence_length=SEQUENCE_LENGTH,
            seed=self.seed,
        )

    def statistics(self, source: str, *, gram: bool = False) -> Mapping[str, InputStatistics]:
        """Statistics by parameter name; `source` is `file`, `random`, `none`, or `auto`: the file where there is one.

        Raises:
            CalibrationError: the file cannot be used.
        """
        if source == "auto":
            source = "file" if self.is_data(source) else "random"
        if source == "none":
            return {}
        if (source, gram) not in self._known:
            self._known[source, gram] = self.measure(source, gram=gram)
        return self._known[source, gram]

    def is_data(self, source: str) -> bool:
        """Whether this source is the calibration file."""
        return source == "file" or (source == "auto" and self.path is not None)

    def measure(self, source: str, *, gram: bool) -> Mapping[str, InputStatistics]:
        """Run the expert over the file's windows, or over the random tokens that `meswitch compress` would use."""
        weights, random = self.expert.weights, source == "random"
        stored = next(iter(weights.checkpoint.tensors.values())).dtype
        found: dict[str, InputStatistics] = {}
        head = stream_statistics(
            weights.checkpoint,
            weights.architecture,
            random_window(vocabulary_size(weights), self.seed) if random else self.windows(),
            lambda _, layer: found.update(layer),
            gram=gram,
            keep=random,
            dtype=torch.bfloat16 if random and stored == torch.bfloat16 else None,
        )
        return found | head


class BaselineWeights:
    """The model that a method's deltas make on the base: linears by the method, embedding and head at `embedding`
    bits as an artifact has them, everything else as the expert's."""

    def __init__(self, method: Method, base: CheckpointWeights, expert: Expert, activations: Activations) -> None:
        self.method, self.base, self.expert = method, base, expert
        self.plan: Plan = make_plan(base.checkpoint, expert.weights.checkpoint)
        self._planned = {item.name: item for item in self.plan.tensors}
        self._activations = activations
        self._kept: dict[str, torch.Tensor] = {}
        self._nbytes: dict[str, int] = {}
        self._trained: dict[str, torch.Tensor] | None = None
        numel = sum(torch.Size(item.shape).numel() for item in self.plan.tensors)
        self._keep = 4 * numel <= KEPT_BYTES

    @property
    def name(self) -> str:
        return f"{self.method.spec} of {self.expert.label}"

    @property
    def config(self) -> dict[str, Any]:
        return self.expert.weights.config

    @property
    def architecture(self) -> Architecture:
        return self.plan.architecture

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors read so far."""
        return sum(self._nbytes.values())

    def read(self, name: str) -> torch.Tensor:
        name = self.architecture.parameters[name].tied_to or name
        if name in self._kept:
            return self._kept[name]
        value, self._nbytes[name] = self._made(self._planned[name])
        if self._keep:
            self._kept[name] = value
        return value

    def _statistics(self) -> Mapping[str, InputStatistics]:
        options = self.method.options
        steps, source = options.get("steps"), str(options.get("activations"))
        if not (options.get("salient") or steps in ("layerwise", "output-unbiased")):
            return {}
        whole = steps == "layerwise" or (steps == "output-unbiased" and self._activations.is_data(source))
        return self._activations.statistics(source, gram=whole)

    def _distilled(self) -> dict[str, torch.Tensor]:
        """The linears' deltas with trained scales; student and teacher are in memory while they are trained."""
        if self._trained is None:
            plain = replace(self.method, options=dict(self.method.options) | {"distill": 0})
            start = BaselineWeights(plain, self.base, self.expert, self._activations)
            device = torch.device("cpu")
            student, teacher = (build_model(weights, device, torch.float32) for weights in (start, self.expert.weights))
            linears = {}
            for item in self.plan.tensors:
                if item.kind == "linear":
                    base = self.base.checkpoint.read(item.base_stored).float()
                    linears[item.name] = (base, self.expert.weights.checkpoint.read(item.expert_stored).float() - base)
            masks, updates = int(self.method.options["masks"]), int(self.method.options["distill"])
            windows = self._activations.windows()
            self._trained = distil_scales(student, teacher, linears, masks, windows, ScaleTraining(updates))
        return self._trained

    def _vocabulary(self, item: PlannedTensor, delta: torch.Tensor) -> Approximation:
        """Embedding and head as an artifact has them: a head of the `meswitch` method has its salient channels too."""
        settings = QuantizerSettings(int(self.method.options["embedding"]), 0)
        if item.kind != "head" or self.method.name != "meswitch":
            return salient_delta(delta, settings, "error", None, torch.Generator())
        settings = replace(self.method.quantizer(), bits=settings.bits, rank=0)
        return salient_delta(delta, settings, "error", self._statistics().get(item.name), torch.Generator())

    def _made(self, item: PlannedTensor) -> tuple[torch.Tensor, int]:
        stored = self.expert.weights.checkpoint.read(item.expert_stored)
        base = self.base.checkpoint.read(item.base_stored)
        kept_whole = item.kind != "linear" and self.method.options["embedding"] == 16
        if item.kind == "dense" or kept_whole:
            same = stored.shape == base.shape and torch.equal(stored.float(), base.float())
            return stored, 0 if same else stored.nbytes
        rows = item.shared_rows
        delta = stored[:rows].float() - base[:rows].float()
        if not delta.any():
            made = Approximation(delta, 0)
        elif item.kind == "linear" and self.method.options.get("distill"):
            nbytes = self.method.approximate(item.name, delta, None).nbytes
            made = Approximation(self._distilled()[item.name], nbytes)
        elif item.kind == "linear":
            made = self.method.approximate(item.name, delta, self._statistics().get(item.name))
        else:
            made = self._vocabulary(item, delta)
        value = base[:rows].float() + made.delta
        added = stored[rows:]
        return torch.cat([value, added.float()]), made.nbytes + added.nbytes


def baseline_candidate(
    spec: str, base: CheckpointWeights, expert: Expert, activations: Activations, *, several: bool
) -> Candidate:
    """The model of `--baseline spec` for an expert; `several` experts have theirs told apart by label.

    Raises:
        UsageError: the spec is wrong, or needs calibration data that was not given.
    """
    method = parse_method(spec)
    if method.needs_calibration and activations.path is None:
        raise UsageError(f"--baseline {spec} needs calibration data: give --calibration FILE.jsonl")
    label = f"{spec} ({expert.label})" if several else spec
    facts = {"method": method.name, "options": dict(method.options)}
    return Candidate(label, expert.label, "baseline", BaselineWeights(method, base, expert, activations), facts)
