"""Whether an expert is stored as codes or bit for bit, where a user leaves that open: in the fewer bytes; and what code
a server is to make of one that is bit for bit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.delta.exact import encode
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import expected_entry, projection_of
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.adapted import AdaptedCheckpoint
from meswitch_cli.model.matching import Plan, PlannedTensor

#: Tensors of a projection that are looked at, the first and the last among them, and weights of each.
SAMPLED, SAMPLE_WEIGHTS = 3, 1 << 20
#: What a server makes of an expert that is bit for bit, by settings beside `exact`: the first that leaves less than
#: `MOST_ERROR` of the delta's energy as error. An update with directions of its own is nearer by the first, at 0.0029 %
#: in KL against 0.0122; one at random places has none, and two bits are worse there than the base
#: (docs/results/sparse.md).
SERVED_CODES: tuple[Mapping[str, Any], ...] = ({}, {"bits": 4, "group_size": 32, "rank": 0})
MOST_ERROR = 0.5
#: Options that say nothing of the form: a run with these alone leaves it open.
_SILENT = ("samples", "sequence_length", "seed")
#: What options are where they are not given; the others are None or False then.
_ABSENT: Mapping[str, Any] = {"calibration": RANDOM, "group_size": 0, "rounding": "nearest"}


@dataclass(frozen=True)
class FormSizes:
    """Bytes that an expert's tensors are expected to take bit for bit, and in the codes of some settings."""

    exact: int
    code: int

    @property
    def exact_is_smaller(self) -> bool:
        """Whether bit for bit takes no more; of what stores nothing, neither is."""
        return 0 < self.exact <= self.code


def choose_form(job: Job, options: Mapping[str, Any]) -> tuple[Job, FormSizes | None]:
    """What a user leaves open in options, by their names in `CompressionSettings.with_defaults`: the job in its smaller
    form, with the code that a server makes of it; and both sizes where the form was open and there is a choice.

    Raises:
        CheckpointError: a weight cannot be read.
    """
    sizes = None
    if leaves_form_open(options):
        job, sizes = in_smaller_form(job)
    if job.settings.exact and leaves_form_open({**options, "exact": False}):
        job = with_served_code(job)
    return job, sizes


def leaves_form_open(options: Mapping[str, Any]) -> bool:
    """Whether options, by their names in `CompressionSettings.with_defaults`, do not say how an expert is stored."""
    told = {name: value for name, value in options.items() if name not in _SILENT}
    return all(value is None or value is False or value == _ABSENT.get(name) for name, value in told.items())


def in_smaller_form(job: Job) -> tuple[Job, FormSizes | None]:
    """The job, bit for bit where that takes no more bytes than its codes; and both sizes, None of what has no choice.

    Raises:
        CheckpointError: a weight cannot be read.
    """
    sizes = form_sizes(job.base, job.expert, job.plan, job.settings)
    if sizes is None or not sizes.exact_is_smaller:
        return job, sizes
    own = job.settings
    exact = CompressionSettings.with_defaults(
        exact=True, samples=own.samples, sequence_length=own.sequence_length, seed=own.seed
    )
    return replace(job, settings=exact), sizes


def with_served_code(job: Job) -> Job:
    """A job that is bit for bit, with the code that a server makes of it; a note where none is near.

    Raises:
        CheckpointError: a weight cannot be read, is NaN or infinite.
    """
    own = job.settings
    for code in SERVED_CODES:
        settings = CompressionSettings.with_defaults(
            exact=True, samples=own.samples, sequence_length=own.sequence_length, seed=own.seed, **code
        )
        error = _served_error(job, settings.linears())
        if error < MOST_ERROR:
            return replace(job, settings=settings)
    note = (
        f"the codes that a server makes of {job.expert.source.path} miss {error:.0%} of its delta's energy: what is "
        "stored is bit for bit, so restore it and serve that"
    )
    return replace(job, settings=settings, remarks=(*job.remarks, note))


def _served_error(job: Job, quantizer: QuantizerSettings) -> float:
    """The error of a code over the delta's energy, of a linear of every projection; 0 where none changed."""
    projections = {projection_of(item.name): item for item in job.plan.tensors if item.kind == "linear"}
    missed = total = 0.0
    for item in projections.values():
        own, tuned = _some_rows(item.base.read(job.base)), _some_rows(item.expert.read(job.expert))
        try:
            found = quantize(own, tuned, quantizer)
        except FloatingPointError as error:
            raise CheckpointError(f"{item.name}: NaN or infinity in {job.expert.source.path}") from error
        if found:
            total += found[1].delta_energy
            missed += found[1].weight_error * found[1].delta_energy
    return missed / total if total else 0.0


def can_be_exact(expert: Checkpoint) -> bool:
    """Whether an expert is stored as the weights that it has, which can come back bit for bit."""
    return not (expert.is_quantised or isinstance(expert, AdaptedCheckpoint))


def form_sizes(base: Checkpoint, expert: Checkpoint, plan: Plan, settings: CompressionSettings) -> FormSizes | None:
    """Sizes by a sample of every projection's tensors and of their rows; None of what cannot be stored bit for bit.

    Raises:
        CheckpointError: a weight cannot be read.
    """
    if not can_be_exact(expert):
        return None
    exact = code = 0.0
    projections: dict[tuple[str, str], list[PlannedTensor]] = defaultdict(list)
    for item in plan.tensors:
        projections[item.kind, projection_of(item.name)].append(item)
    for items in projections.values():
        chosen = _spread(items)
        found = [_sizes(item, base, expert, settings) for item in chosen]
        if None in found:
            return None
        weights = sum(math.prod(item.shape) for item in chosen)
        scale = sum(math.prod(item.shape) for item in items) / weights if weights else 0.0
        exact += scale * sum(sizes.exact for sizes in found if sizes)
        code += scale * sum(sizes.code for sizes in found if sizes)
    return FormSizes(round(exact), round(code))


def _spread(items: list[PlannedTensor]) -> list[PlannedTensor]:
    """A few, the first and the last among them."""
    places = {round(number * (len(items) - 1) / (SAMPLED - 1)) for number in range(SAMPLED)}
    return [items[place] for place in sorted(places)]


def _sizes(
    item: PlannedTensor, base: Checkpoint, expert: Checkpoint, settings: CompressionSettings
) -> FormSizes | None:
    """Of one tensor; None where its type has no stream."""
    own, tuned = item.base.read(base), item.expert.read(expert)
    itemsize, same_shape = tuned.element_size(), item.shape == item.base_shape
    quantizer = settings.of(item.kind, unrelated=item.unrelated)
    whole = tuned.numel() * itemsize
    if quantizer is None and not same_shape:
        return FormSizes(whole, whole)
    shared = len(tuned) if same_shape and tuned.dim() else item.shared_rows
    parts = [_some_rows(tensor[:shared] if tensor.dim() else tensor) for tensor in (own, tuned)]
    if torch.equal(parts[0].float(), parts[1].float()) and same_shape:
        return FormSizes(0, 0)
    try:
        stream = len(encode(*parts))
    except ValueError:
        return None
    added = (item.shape[0] - shared) * (whole // len(tuned)) if tuned.dim() else 0
    exact = stream * (whole - added) / (parts[1].numel() * itemsize) + added
    if quantizer is None:
        return FormSizes(round(exact), whole)
    return FormSizes(round(exact), expected_entry(quantizer, item.shape, item.base_shape).expected_nbytes(itemsize))


def _some_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows that are spread evenly over a tensor, as many as a sample has room for."""
    return tensor[:: max(1, math.ceil(tensor.numel() / SAMPLE_WEIGHTS))].contiguous() if tensor.dim() else tensor
