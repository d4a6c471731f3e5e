"""How an expert is stored where a user leaves that open: bit for bit, as a merged LoRA's products alone, or in codes,
whichever `FormSizes.best` says; and what code a server is to make of one that is bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from meswitch_cli import __version__
from meswitch_cli.artifact.workspace import unfinished_work
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.product import product_rank
from meswitch_cli.compression.sample import by_projection, some_rows, spread
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.delta.exact import encode
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import expected_entry, projection_of
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.adapted import AdaptedCheckpoint
from meswitch_cli.model.matching import Plan, PlannedTensor

#: Weights that are looked at of each sampled tensor.
SAMPLE_WEIGHTS = 1 << 20
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
#: Under this name the answer lies with unfinished work.
FORM_ANSWER = "form"

Form = Literal["exact", "product", "code"]
#: Products may take so many times the bytes of a code: in as many bytes they have a third of its KL
#: (docs/results/compression.md, of a merged LoRA of rank 64).
PRODUCT_WORTH = 1.05


@dataclass(frozen=True)
class FormSizes:
    """Bytes that an expert's tensors are expected to take: bit for bit, in the codes of some settings, and, where its
    delta is a merged LoRA's, as products of that `rank` alone."""

    exact: int
    code: int
    product: int | None = None
    rank: int | None = None

    @property
    def best(self) -> Form:
        """The form of the fewest bytes, of equals the nearest to the expert, and products where they take hardly more;
        of what stores nothing, the code."""
        least = min(size for size in (self.exact, self.code, self.product) if size is not None)
        if not self.exact or not self.code:
            return "code"
        if self.exact == least:
            return "exact"
        return "product" if self.product is not None and self.product <= PRODUCT_WORTH * least else "code"


def choose_form(job: Job, options: Mapping[str, Any]) -> tuple[Job, FormSizes | None]:
    """What a user leaves open in options, by their names in `CompressionSettings.with_defaults`: the job in its
    best form, with the code that a server makes of one that is bit for bit; and the sizes where there is a choice.

    The weights are not asked again where an interrupted run of the same work has kept the answer.

    Raises:
        ArtifactError: what it kept is damaged.
        CheckpointError: a weight cannot be read, is NaN or infinite.
    """
    if not leaves_form_open({**options, "exact": False}):
        return job, None
    question = {
        "version": __version__,
        "options": dict(options),
        "base_files": job.base.stat_digest(),
        "expert_files": job.expert.stat_digest(),
    }
    kept = unfinished_work(job.out).stored(FORM_ANSWER, _FormAnswer.from_value)
    if kept is None or kept.question != question:
        kept = _asked(job, question, options)
    answered = replace(job, settings=kept.settings, remarks=(*job.remarks, *kept.remarks), form_answer=asdict(kept))
    return answered, kept.sizes


@dataclass(frozen=True)
class _FormAnswer:
    """What `choose_form` found: settings, sizes where there is a choice, notes; and what it was asked."""

    question: Mapping[str, Any]
    settings: CompressionSettings
    sizes: FormSizes | None
    remarks: tuple[str, ...]

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> _FormAnswer:
        """The answer of which `asdict` is this JSON value."""
        sizes = value["sizes"] and FormSizes(**value["sizes"])
        settings = CompressionSettings(**value["settings"])
        return cls(dict(value["question"]), settings, sizes, tuple(value["remarks"]))


def _asked(job: Job, question: Mapping[str, Any], options: Mapping[str, Any]) -> _FormAnswer:
    chosen, sizes = in_smallest_form(job) if leaves_form_open(options) else (job, None)
    if chosen.settings.exact:
        chosen = with_served_code(chosen)
    return _FormAnswer(question, chosen.settings, sizes, chosen.remarks[len(job.remarks) :])


def leaves_form_open(options: Mapping[str, Any]) -> bool:
    """Whether options, by their names in `CompressionSettings.with_defaults`, do not say how an expert is stored."""
    told = {name: value for name, value in options.items() if name not in _SILENT}
    return all(value is None or value is False or value == _ABSENT.get(name) for name, value in told.items())


def in_smallest_form(job: Job) -> tuple[Job, FormSizes | None]:
    """The job in the form that `FormSizes.best` says; and the sizes, None of what has no choice.

    Raises:
        CheckpointError: a weight cannot be read, is NaN or infinite.
    """
    if not can_be_exact(job.expert):
        return job, None
    rank = product_rank(job.base, job.expert, job.plan)
    sizes = form_sizes(job.base, job.expert, job.plan, job.settings, rank)
    if sizes is None or sizes.best == "code":
        return job, sizes
    own = job.settings
    kept: dict[str, Any] = {"samples": own.samples, "sequence_length": own.sequence_length, "seed": own.seed}
    if sizes.best == "exact":
        return replace(job, settings=CompressionSettings.with_defaults(exact=True, **kept)), sizes
    settings = product_settings(sizes.rank or 0, **kept)
    return replace(job, settings=settings.for_products(has_head=job.plan.has_head)), sizes


def product_settings(rank: int, **others: Any) -> CompressionSettings:
    """Products of a rank alone; embedding and head as in the default code."""
    return CompressionSettings.with_defaults(bits=0, rank=rank, **others)


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
        halves = item.base.read(job.base), item.expert.read(job.expert)
        own, tuned = (some_rows(half, SAMPLE_WEIGHTS) for half in halves)
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


def form_sizes(
    base: Checkpoint, expert: Checkpoint, plan: Plan, settings: CompressionSettings, rank: int | None = None
) -> FormSizes | None:
    """Sizes by a sample of every projection's tensors and of their rows; None of what cannot be stored bit for bit.

    `rank` is that of the products that explain the expert, None where none do.

    Raises:
        CheckpointError: a weight cannot be read.
    """
    if not can_be_exact(expert):
        return None
    product = product_settings(rank) if rank else None
    total = [0.0, 0.0, 0.0]
    for items in by_projection(plan.tensors).values():
        chosen = spread(items)
        weights = sum(math.prod(item.shape) for item in chosen)
        scale = sum(math.prod(item.shape) for item in items) / weights if weights else 0.0
        for item in chosen:
            found = _sizes(item, base, expert, settings, product)
            if found is None:
                return None
            total = [sum_ + scale * size for sum_, size in zip(total, found, strict=True)]
    exact, code, low = (round(size) for size in total)
    return FormSizes(exact, code, low if rank else None, rank)


def _sizes(
    item: PlannedTensor,
    base: Checkpoint,
    expert: Checkpoint,
    settings: CompressionSettings,
    product: CompressionSettings | None,
) -> tuple[float, int, int] | None:
    """Bytes of one tensor bit for bit, in codes and in the products' form; None where its type has no stream."""
    own, tuned = item.base.read(base), item.expert.read(expert)
    itemsize, same_shape = tuned.element_size(), item.shape == item.base_shape
    quantizer = settings.of(item.kind, unrelated=item.unrelated)
    whole = tuned.numel() * itemsize
    if quantizer is None and not same_shape:
        return whole, whole, whole
    shared = len(tuned) if same_shape and tuned.dim() else item.shared_rows
    parts = [some_rows(tensor[:shared] if tensor.dim() else tensor, SAMPLE_WEIGHTS) for tensor in (own, tuned)]
    if torch.equal(parts[0].float(), parts[1].float()) and same_shape:
        return 0, 0, 0
    try:
        stream = len(encode(*parts))
    except ValueError:
        return None
    added = (item.shape[0] - shared) * (whole // len(tuned)) if tuned.dim() else 0
    exact = stream * (whole - added) / (parts[1].numel() * itemsize) + added
    if quantizer is None:
        return exact, whole, whole

    def coded(by: CompressionSettings) -> int:
        found = by.of(item.kind, unrelated=item.unrelated)
        assert found is not None
        return expected_entry(found, item.shape, item.base_shape).expected_nbytes(itemsize)

    return exact, coded(settings), coded(product) if product else 0
