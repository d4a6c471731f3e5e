"""The whole of `meswitch compress`: two checkpoints to a finished artifact, unit by unit, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from meswitch_cli import __version__
from meswitch_cli.artifact.card import MODEL_CARD, Card, model_card
from meswitch_cli.artifact.carried import carried_file
from meswitch_cli.artifact.manifest import FileEntry, Manifest, ModelReference, shard_name
from meswitch_cli.artifact.pack import MAX_SHARD_BYTES, first_shard
from meswitch_cli.artifact.quantization import for_transformers
from meswitch_cli.artifact.served import settings_of
from meswitch_cli.artifact.sidefiles import CONFIG_FILE, expert_files
from meswitch_cli.artifact.workspace import Inputs, UnitRecord, Workspace, workspace
from meswitch_cli.calibration.data import CalibrationFile
from meswitch_cli.calibration.stream import LayerStatistics, calibration_dtype, stream_statistics
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import fingerprint
from meswitch_cli.compression.choice import with_choice
from meswitch_cli.compression.closeness import WeakDeltaError, refuse_weak
from meswitch_cli.compression.distill import distill
from meswitch_cli.compression.exact import stream_of
from meswitch_cli.compression.form import FORM_ANSWER
from meswitch_cli.compression.low_rank import products_of
from meswitch_cli.compression.pairs import ExpertAhead, PairReader, Side, TensorPair, reading_order
from meswitch_cli.compression.plan import Job, OnProgress
from meswitch_cli.compression.product import nothing_of_rounded
from meswitch_cli.compression.settings import ADAPTER_FACTOR_BITS, RANDOM, CompressionSettings
from meswitch_cli.compression.unit import compress_unit
from meswitch_cli.compression.windows import calibration_windows
from meswitch_cli.errors import ArtifactError, CheckpointError, UsageError
from meswitch_cli.model.adapted import AdaptedCheckpoint, open_expert
from meswitch_cli.model.dtype import dtype_name, stored_dtype
from meswitch_cli.model.matching import PlannedTensor, make_plan
from meswitch_cli.printable import require_name

#: Tokens by which an expert of a mixture is calibrated at the least.
LEAST_TOKENS = 8
_QUANTISED = "unit"
_FINAL = "final"


def prepare(
    base: str, expert: str, out: Path, settings: CompressionSettings, calibration: CalibrationFile | None
) -> Job:
    """Open both checkpoints and match them on metadata alone.

    Raises:
        CheckpointError: one of them cannot be used, or they do not belong together.
        UsageError: more salient channels asked for than a layer has inputs, or a width of factors that there are not.
    """
    opened_base = Checkpoint.open(base)
    opened_expert = open_expert(expert, opened_base)
    if settings.exact:
        _refuse_inexact(opened_expert)
        settings = settings.for_exact()
    if isinstance(opened_expert, AdaptedCheckpoint):
        settings = settings.for_adapter(has_full_layers=opened_expert.has_full_layers)
    elif settings.factor_bits is not None and not (settings.rank or settings.embedding_rank):
        raise UsageError(f"--factor-bits: there are no factors; {opened_expert.source.path} is no adapter, give --rank")
    for opened in (opened_base, opened_expert):
        require_name(opened.source.id, opened.source.path, CheckpointError)
    plan = make_plan(opened_base, opened_expert)
    if not settings.bits:
        settings = settings.for_products(has_head=plan.has_head)
    linears = [item for item in plan.tensors if item.kind == "linear"]
    narrowest = min(linears, key=lambda item: item.shape[1], default=None)
    if narrowest is not None and settings.salient > narrowest.shape[1]:
        raise UsageError(f"--salient {settings.salient}: {narrowest.name} has only {narrowest.shape[1]} input channels")
    return Job(
        base=opened_base,
        expert=opened_expert,
        plan=plan,
        settings=settings,
        calibration=calibration,
        out=out,
        side_files=expert_files(opened_expert.side_folders[0], opened_expert.config, opened_expert.side_folders[1:]),
    )


def compress(
    job: Job,
    *,
    device: torch.device | str = "cpu",
    force: bool = False,
    keep_weak: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: OnProgress = lambda what, nbytes, units: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Do the work, or go on where an interrupted run of the same work stopped.

    `on_note` hears what the user should know of the result. Unfinished work is dropped where the result is too weak.

    Raises:
        ArtifactError: the output is occupied or cannot be written, or unfinished work there differs from this job.
        CheckpointError: a weight is damaged.
        UsageError: the expert does not fit into the size that was asked for.
        WeakDeltaError: the result is farther from the expert than the base is; `keep_weak` makes it a note.
    """
    with workspace(job.out, force=force) as space:
        _continue_or_start(job, space, force)
        if job.form_answer is not None:
            space.store(FORM_ANSWER, job.form_answer)
        if job.settings.has_budget:
            job = with_choice(job, space, device, on_progress)
        records = _quantise(job, space, device, on_progress, on_note)
        if job.settings.steps == "distill":
            records = distill(job, space, records, device, on_progress, stage=_FINAL)
        on_progress("check", 0, len(records))
        try:
            weakness = refuse_weak(job, space, records, device, keep=keep_weak)
        except WeakDeltaError:
            space.drop()
            raise
        if weakness:
            on_note(weakness)
        manifest, side_files = _finish(job, records, max_shard_bytes)
        return space.publish(manifest, side_files, max_shard_bytes)


def _refuse_inexact(expert: Checkpoint) -> None:
    """Refuse to store bit for bit what is made when it is read.

    Raises:
        UsageError: the expert is an adapter, or stored in few bits.
    """
    if expert.is_quantised:
        raise UsageError(f"--exact: {expert.source.path} is stored quantised, and is restored in 16 bit")
    if isinstance(expert, AdaptedCheckpoint):
        raise UsageError(f"--exact: {expert.source.path} is an adapter, whose products are stored as they are")


def _continue_or_start(job: Job, space: Workspace, force: bool) -> None:
    """Check that unfinished work is of this job; `force` drops it where it is not."""
    inputs = Inputs(
        version=__version__,
        settings=job.settings.to_dict(),
        base_files=job.base.stat_digest(),
        expert_files=job.expert.stat_digest(),
    )
    earlier = space.inputs()
    if earlier is None:
        space.begin(inputs)
        return
    changes = job.settings.changes_from(earlier.settings)
    if earlier.version != __version__:
        changes.append(f"meswitch: {earlier.version} -> {__version__}")
    if earlier.base_files != inputs.base_files:
        changes += _changed_weights(job, space, "base", job.base)
    if earlier.expert_files != inputs.expert_files:
        changes += _changed_weights(job, space, "expert", job.expert)
    if changes and force:
        space.begin(inputs)
        return
    if changes:
        raise ArtifactError(
            f"{job.out}: unfinished work there was begun with other inputs ({'; '.join(changes)}). "
            "Run the earlier command to finish it, or give --force to start over"
        )
    space.set_inputs(inputs)


def _changed_weights(job: Job, space: Workspace, which: Side, checkpoint: Checkpoint) -> list[str]:
    """Files were touched since: compare the weights that finished units were made from."""
    for index, unit in enumerate(job.plan.units):
        record = space.record(index, _QUANTISED)
        if record is None:
            continue
        known = record.base_digests if which == "base" else record.expert_digests
        for item in unit:
            storage = item.base if which == "base" else item.expert
            name = storage.parameter.name
            if known.get(name) != storage.digest(checkpoint, storage.read(checkpoint)):
                return [f"{which}: tensor {storage.name!r} is not what it was"]
    return []


def _quantise(
    job: Job,
    space: Workspace,
    device: torch.device | str,
    on_progress: OnProgress,
    on_note: Callable[[str], None],
) -> list[UnitRecord]:
    """Bring every unit to its quantised state and return the records."""
    seldom, experts = 0, 0
    units = job.plan.units
    records = {index: record for index in range(len(units)) if (record := space.record(index, _QUANTISED))}
    for index in records:
        on_progress("resumed", job.nbytes_of(units[index]), len(records))
    missing = [index for index in range(len(units)) if index not in records]
    calibrated = bool(missing) and job.settings.calibration is not None
    told = products_of(job.expert, job.settings.factor_bits or ADAPTER_FACTOR_BITS)
    if job.settings.exact:
        told = stream_of
    elif told is None and not job.settings.bits:
        told = nothing_of_rounded
    with (
        PairReader(job.base, job.expert, reading_order(units, missing, calibrated=calibrated)) as reader,
        closing(_statistics(job, reader, device, missing, calibrated)) as known,
    ):
        for index, statistics in known:
            if calibrated and index < len(units) - 1:
                on_progress("calibrate", 0, index)
            if index in missing:
                shard = shard_name(index, len(units))
                if job.settings.steps == "distill":
                    shard = f"quantised-{shard}"
                if calibrated:
                    known_well = _reached(units[index], statistics)
                    seldom += sum(item.stacked and item.name not in known_well for item in units[index])
                    experts += sum(item.stacked for item in units[index])
                    statistics = known_well
                pairs = (reader.pair(item) for item in units[index])
                counted = _counting(pairs, lambda nbytes: on_progress("compress", nbytes, len(records)))
                data, record = compress_unit(counted, shard, job.settings_of, statistics, device, told)
                space.finish_unit(index, _QUANTISED, data, record)
                records[index] = record
                on_progress("compress", 0, len(records))
            else:
                reader.forget(units[index])
            del statistics  # a layer's may be larger than its weights, and the next layer is about to run
    if seldom:
        on_note(
            f"{job.out}: fewer than {LEAST_TOKENS} calibration tokens reach {seldom} of {experts} matrices of experts: "
            "these are compressed as without calibration; give "
            + ("--calibration FILE" if job.settings.calibration == RANDOM else "more --samples")
        )
    return [records[index] for index in range(len(units))]


def _reached(unit: Iterable[PlannedTensor], statistics: LayerStatistics) -> LayerStatistics:
    """The statistics without those of experts that too few tokens reached to tell one input channel from another."""
    stacked = {item.name for item in unit if item.stacked}
    return {name: known for name, known in statistics.items() if name not in stacked or known.tokens >= LEAST_TOKENS}


def _statistics(
    job: Job, reader: PairReader, device: torch.device | str, missing: list[int], calibrated: bool
) -> Generator[tuple[int, LayerStatistics], None, None]:
    """The units to go through, in order, with what is known of their inputs.

    A calibration forward asks the reader for each layer's tensors, runs it, and stands still while its pairs, which
    hold the same tensors, are quantised: so each is read once, and one layer is in memory at a time.
    """
    if not calibrated:
        yield from ((index, {}) for index in missing)
        return
    few_tokens, stored = job.settings.calibration == RANDOM, stored_dtype(job.expert)
    yield from stream_statistics(
        ExpertAhead(job.expert, job.plan, reader),
        calibration_windows(job),
        gram=job.settings.takes_gram,
        keep=few_tokens,
        experts_gram=job.settings.linears().needs_gram,
        device=device,
        dtype=calibration_dtype(stored, device, few_tokens=few_tokens),
    )


def _counting(pairs: Iterator[TensorPair], report: Callable[[int], None]) -> Iterator[TensorPair]:
    for pair in pairs:
        nbytes = pair.nbytes
        yield pair
        del pair  # before the next is asked for: an embedding's is half a gigabyte
        report(nbytes)


def _finish(job: Job, records: list[UnitRecord], max_shard_bytes: int) -> tuple[Manifest, dict[str, bytes]]:
    base_digests: dict[str, str] = {}
    expert_digests: dict[str, str] = {}
    for record in records:
        base_digests |= record.base_digests
        expert_digests |= record.expert_digests
    base, expert = job.base.source, job.expert.source
    shards = tuple(record.shard for record in records)
    named = base.id if base.revision is None else f"{base.id}@{base.revision}"
    weights = first_shard([shard.nbytes for shard in shards], max_shard_bytes)
    side_files = {
        **job.side_files,
        **carried_file(job.base, job.expert),
        CONFIG_FILE: for_transformers(job.side_files[CONFIG_FILE], named, weights),
    }
    manifest = Manifest(
        base=ModelReference(base.id, base.revision, fingerprint(base_digests)),
        expert=ModelReference(expert.id, expert.revision, fingerprint(expert_digests)),
        model_type=job.plan.architecture.model_type,
        num_layers=job.plan.architecture.num_layers,
        dtype=dtype_name(stored_dtype(job.expert)),
        settings=job.settings.to_dict()
        | ({"expected": dict(job.choice.expected)} if job.choice else {})
        | (settings_of(job.settings.by_kind()) if job.settings.exact else {}),
        tensors=tuple(entry for record in records for entry in record.tensors),
        unchanged=tuple(name for record in records for name in record.unchanged),
        shards=shards,
        files=tuple(
            FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(side_files.items())
        ),
        config_differences=json.loads(json.dumps(job.config_differences()), parse_constant=str),  # NaN is not JSON
        created_with=f"meswitch {__version__}",
    )
    card = model_card(manifest, Card.read(job.expert.source.path), job.expert.nbytes, job.form)
    return manifest, {**side_files, MODEL_CARD: card}  # nothing reads a card, and people edit it: it is not listed
