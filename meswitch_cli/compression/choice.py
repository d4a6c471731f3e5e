"""A size that an artifact may take, to settings of every tensor: measured, then allocated."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from meswitch_cli.artifact.shard import SHARD_NBYTES
from meswitch_cli.artifact.workspace import Workspace
from meswitch_cli.calibration.data import random_window
from meswitch_cli.calibration.sensitivity import Sensitivities, drawn_windows, stream_sensitivities
from meswitch_cli.calibration.stream import calibration_dtype
from meswitch_cli.compression.budget import Allocation, Point, allocate, least_nbytes, near_hull
from meswitch_cli.compression.plan import Job, OnProgress, SizeChoice
from meswitch_cli.compression.settings import RANDOM
from meswitch_cli.compression.size import entry_nbytes, named_like
from meswitch_cli.compression.windows import calibration_windows
from meswitch_cli.delta.codes import CODES, TRELLIS_CODES, CodeName
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import EmbeddingSensitivity, LinearSensitivity, Sensitivity
from meswitch_cli.delta.stored import TensorEntry, expected_entry, projection_of
from meswitch_cli.delta.trade_off import Options, trade_off
from meswitch_cli.errors import CalibrationError, CheckpointError, UsageError
from meswitch_cli.model.adapted import AdaptedCheckpoint
from meswitch_cli.model.dtype import stored_dtype
from meswitch_cli.model.matching import PlannedTensor
from meswitch_cli.model.weights import CheckpointWeights

_CODES: tuple[tuple[float, CodeName], ...] = (
    *((bits, "trellis") for bits in TRELLIS_CODES),
    *((bits, "scalar") for bits in CODES),
)
#: What may be chosen for a kind of tensor.
OPTIONS = {
    "linear": Options(_CODES, ranks=(0, 4, 16, 64), salient=(0, 2, 8, 32)),
    "head": Options(_CODES, ranks=(0, 16), salient=(0, 2, 8, 32)),
    "embedding": Options(_CODES, ranks=(0, 16)),
}
#: Of what errors of embedding and head cost by reckoning, on tokens that the expert is unsure of, this is counted: on
#: its own answers they cost far less beside linears (docs/results/trellis.md).
VOCABULARY_SHARE = 0.1
#: Windows whose predictions are asked, and tokens of each; random windows have their own length.
WINDOWS, WINDOW_TOKENS = 4, 128
#: What a setting costs by reckoning, over the lower convex hull of all of them, up to which it is measured.
MARGIN = 1.2
#: Weights of a tensor from which settings are left out so. On short rows noise depends on more than a code's own.
LEAST_WEIGHTS = 1 << 16
_CHOICE = "choice"
#: What is kept of chosen settings.
_MEMBERS = ("bits", "code", "rank", "salient")

#: What was measured of a unit: costs by tensor, in the order of its options, None of those that were not worth it; None
#: for a tensor that equals the base's.
_Costs = dict[str, list[float | None] | None]


def with_choice(job: Job, space: Workspace, device: torch.device | str, on_progress: OnProgress) -> Job:
    """The job with settings of every tensor that keep within its budget; measured units and the choice are kept.

    Raises:
        UsageError: the budget is less than the smallest settings take; the unfinished work is dropped.
        CalibrationError: the family's layers cannot be run one by one.
        CheckpointError: a weight is damaged.
    """
    asked = "--size" if job.settings.size is not None else "--target-bits"
    if isinstance(job.expert, AdaptedCheckpoint):
        space.drop()
        raise UsageError(f"{asked}: an adapter's size is its rank's; give --factor-bits")
    if any(item.stacked for item in job.plan.tensors):
        space.drop()
        raise UsageError(f"{asked} cannot be kept for a mixture of experts; give --bits")
    known = space.stored(_CHOICE)
    if known is None:
        costs: _Costs = {}
        for part in _measured(job, space, device, on_progress):
            costs |= part
        try:
            known = _chosen(job, costs)
        except UsageError:
            space.drop()
            raise
        space.store(_CHOICE, known)
    settings = {
        item.name: replace(_template(job, item), **dict(zip(_MEMBERS, known["settings"][item.name], strict=True)))
        for item in job.plan.tensors
        if item.name in known["settings"]
    }
    return replace(job, choice=SizeChoice(settings, known["expected"]))


def _template(job: Job, item: PlannedTensor) -> QuantizerSettings:
    return job.settings.by_kind()[item.kind]


def _is_chosen(item: PlannedTensor) -> bool:
    return item.kind in OPTIONS and not item.unrelated


def _measured(job: Job, space: Workspace, device: torch.device | str, on_progress: OnProgress) -> list[_Costs]:
    units, weights, seed = job.plan.units, CheckpointWeights(job.expert), job.settings.seed
    few_tokens = job.settings.calibration == RANDOM
    dtype = calibration_dtype(stored_dtype(job.expert), device, few_tokens=few_tokens)
    windows = _windows(job)
    if few_tokens:
        windows = drawn_windows(weights, windows, seed=seed, device=device, dtype=dtype)
    result: list[_Costs] = []
    for index, found in stream_sensitivities(weights, windows, seed=seed, device=device, dtype=dtype):
        on_progress("measure", 0, len(result))
        name = f"measured-{index:05d}"
        costs: _Costs | None = space.stored(name)
        if costs is None:
            costs = {item.name: _costs_of(job, item, found, device) for item in units[index]}
            space.store(name, costs)
        result.append(costs)
    return result


def _windows(job: Job) -> torch.Tensor:
    if job.settings.calibration != RANDOM:
        return calibration_windows(job)[:WINDOWS, :WINDOW_TOKENS]
    vocabulary = job.plan.architecture.vocabulary
    return torch.cat([random_window(vocabulary, job.settings.seed + index) for index in range(WINDOWS)])


def _costs_of(
    job: Job, item: PlannedTensor, found: Sensitivities, device: torch.device | str
) -> list[float | None] | None:
    """Costs of a tensor's options; of one that has none, no numbers."""
    rows = item.shared_rows
    base, expert = item.base.read(job.base), item.expert.read(job.expert)
    if not _is_chosen(item):
        same = item.shape == item.base_shape and torch.equal(base.float(), expert.float())
        return None if same else []
    options, template = OPTIONS[item.kind].within(item.shape), _template(job, item)
    some = math.prod(item.shape) >= LEAST_WEIGHTS

    def worth_measuring(reckoned: list[float]) -> list[bool]:
        sizes = _sizes(job, item, options.settings(template))
        return near_hull([Point(*both) for both in zip(sizes, reckoned, strict=True)], MARGIN)

    try:
        costs = trade_off(
            base[:rows],
            expert[:rows],
            options,
            template,
            _sensitivity(job, item, found),
            device,
            worth_measuring=worth_measuring if some else None,
            every_row=item.kind != "linear",
        )
        return None if costs is None else [cost if math.isfinite(cost) else None for cost in costs]
    except FloatingPointError as error:
        raise CheckpointError(f"tensor {item.name!r}: a weight is NaN or infinite: a checkpoint is damaged") from error


def _sensitivity(job: Job, item: PlannedTensor, found: Sensitivities) -> Sensitivity:
    own = found.get(item.name)
    if isinstance(own, EmbeddingSensitivity):
        planned = {other.name for other in job.plan.tensors}
        heads = [value for name, value in found.items() if isinstance(value, LinearSensitivity) and name not in planned]
        return replace(own, head=heads[0] if heads else None)
    if own is not None:
        return own
    # An expert of a mixture that no token reached is as important as one that some did.
    shape = {other.name: other.shape for other in job.plan.tensors}
    for name, value in found.items():
        if shape.get(name) == item.shape:
            return value
    raise CalibrationError(f"no token reached {item.name}: what its errors cost is not known; give --bits")


def _chosen(job: Job, costs: Mapping[str, list[float | None] | None]) -> dict[str, Any]:
    """Settings by tensor, and what they are expected to cost.

    Raises:
        UsageError: the budget is too small.
    """
    budget = job.budget
    assert budget is not None
    fixed = SHARD_NBYTES * len(job.plan.units)
    items: list[PlannedTensor] = []
    settings: list[list[QuantizerSettings]] = []
    points: list[list[Point]] = []
    for item in job.plan.tensors:
        own = costs[item.name]
        if own is None and item.shape == item.base_shape:
            continue
        if own:
            choices = OPTIONS[item.kind].within(item.shape).settings(_template(job, item))
            sizes = _sizes(job, item, choices)
            measured = [(place, cost) for place, cost in enumerate(own) if cost is not None]
            share = 1.0 if item.kind == "linear" else VOCABULARY_SHARE
            items.append(item)
            settings.append([choices[place] for place, _ in measured])
            points.append([Point(sizes[place], share * cost) for place, cost in measured])
        else:
            quantizer = job.settings.of(item.kind, unrelated=item.unrelated)
            if own is None or quantizer is None:
                entry = TensorEntry(name="", kind="dense", shape=item.shape, base="", base_shape=item.base_shape)
            else:
                entry = expected_entry(quantizer, item.shape, item.base_shape)
            fixed += entry_nbytes(entry, _itemsize(job, item), named_like(item), _digits(job))
    least = fixed + least_nbytes(points)
    if least > budget:
        asked = "--size" if job.settings.size is not None else "--target-bits"
        weights = sum(math.prod(item.shape) for item in job.plan.tensors)
        raise UsageError(
            f"{asked}: {budget:,} bytes are too few: the smallest settings take {least:,} "
            f"({8 * least / weights:.3f} bits a weight)"
        )
    found = allocate(points, budget - fixed)
    picked = [choices[index] for choices, index in zip(settings, found.chosen, strict=True)]
    return {
        "settings": {
            item.name: [getattr(choice, member) for member in _MEMBERS]
            for item, choice in zip(items, picked, strict=True)
        },
        "expected": _expected(items, points, found),
    }


def _sizes(job: Job, item: PlannedTensor, choices: Sequence[QuantizerSettings]) -> list[int]:
    """Bytes with each of the choices, headers with them."""
    return list(
        _sizes_at(tuple(choices), item.shape, item.base_shape, _itemsize(job, item), named_like(item), _digits(job))
    )


@functools.lru_cache(maxsize=1024)  # layers are alike, and a thousand headers take as long to write as to be measured
def _sizes_at(choices: tuple[QuantizerSettings, ...], *of_tensor: Any) -> tuple[int, ...]:
    shape, base_shape, *rest = of_tensor
    return tuple(entry_nbytes(expected_entry(choice, shape, base_shape), *rest) for choice in choices)


def _itemsize(job: Job, item: PlannedTensor) -> int:
    return item.expert.info(job.expert).dtype.itemsize


def _digits(job: Job) -> int:
    return len(str(job.budget))


def _expected(items: list[PlannedTensor], points: list[list[Point]], found: Allocation) -> dict[str, Any]:
    by_projection: dict[str, float] = defaultdict(float)
    for item, own, index in zip(items, points, found.chosen, strict=True):
        by_projection[projection_of(item.name)] += own[index].cost
    # The last digits depend on the number of threads, and say nothing.
    return {
        "kl": float(f"{found.cost:.3g}"),
        "least_kl": float(f"{found.bound:.3g}"),
        "by_projection": {name: float(f"{cost:.3g}") for name, cost in by_projection.items()},
    }
