"""The whole of `meswitch compress`: two checkpoints to a finished artifact, unit by unit, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path

import torch

from meswitch_cli import __version__
from meswitch_cli.artifact.manifest import FileEntry, Manifest, ModelReference, shard_name
from meswitch_cli.artifact.sidefiles import MODEL_CARD, expert_files, model_card
from meswitch_cli.artifact.workspace import Inputs, UnitRecord, Workspace, workspace
from meswitch_cli.calibration.data import CalibrationFile
from meswitch_cli.calibration.stream import LayerStatistics, calibration_dtype, stream_statistics
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import fingerprint, tensor_digest
from meswitch_cli.compression.choice import with_choice
from meswitch_cli.compression.closeness import WeakDeltaError, refuse_weak
from meswitch_cli.compression.distill import distill
from meswitch_cli.compression.pairs import ExpertAhead, PairReader, Side, TensorPair, reading_order
from meswitch_cli.compression.plan import Job, OnProgress
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.compression.unit import compress_unit
from meswitch_cli.compression.windows import calibration_windows
from meswitch_cli.errors import ArtifactError, CheckpointError, UsageError
from meswitch_cli.model.dtype import dtype_name, stored_dtype
from meswitch_cli.model.matching import make_plan
from meswitch_cli.printable import require_name

_QUANTISED = "unit"
_FINAL = "final"


def prepare(
    base: str, expert: str, out: Path, settings: CompressionSettings, calibration: CalibrationFile | None
) -> Job:
    """Open both checkpoints and match them on metadata alone.

    Raises:
        CheckpointError: one of them cannot be used, or they do not belong together.
        UsageError: more salient channels asked for than a layer has inputs.
    """
    opened_base, opened_expert = Checkpoint.open(base), Checkpoint.open(expert)
    for opened in (opened_base, opened_expert):
        require_name(opened.source.id, opened.source.path, CheckpointError)
    plan = make_plan(opened_base, opened_expert)
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
        side_files=expert_files(opened_expert.source.path, opened_expert.config),
    )


def compress(
    job: Job,
    *,
    device: torch.device | str = "cpu",
    force: bool = False,
    keep_weak: bool = False,
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
        if job.settings.has_budget:
            job = with_choice(job, space, device, on_progress)
        records = _quantise(job, space, device, on_progress)
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
        manifest, side_files = _finish(job, records)
        space.publish(manifest, side_files)
    return manifest


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
            if known.get(name) != tensor_digest(name, storage.read(checkpoint)):
                return [f"{which}: tensor {storage.name!r} is not what it was"]
    return []


def _quantise(job: Job, space: Workspace, device: torch.device | str, on_progress: OnProgress) -> list[UnitRecord]:
    """Bring every unit to its quantised state and return the records."""
    units = job.plan.units
    records = {index: record for index in range(len(units)) if (record := space.record(index, _QUANTISED))}
    for index in records:
        on_progress("resumed", job.nbytes_of(units[index]), len(records))
    missing = [index for index in range(len(units)) if index not in records]
    calibrated = bool(missing) and job.settings.calibration is not None
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
                pairs = (reader.pair(item) for item in units[index])
                counted = _counting(pairs, lambda nbytes: on_progress("compress", nbytes, len(records)))
                data, record = compress_unit(counted, shard, job.settings_of, statistics, device)
                space.finish_unit(index, _QUANTISED, data, record)
                records[index] = record
                on_progress("compress", 0, len(records))
            else:
                reader.forget(units[index])
            del statistics  # a layer's may be larger than its weights, and the next layer is about to run
    return [records[index] for index in range(len(units))]


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
        device=device,
        dtype=calibration_dtype(stored, device, few_tokens=few_tokens),
    )


def _counting(pairs: Iterator[TensorPair], report: Callable[[int], None]) -> Iterator[TensorPair]:
    for pair in pairs:
        nbytes = pair.nbytes
        yield pair
        del pair  # before the next is asked for: an embedding's is half a gigabyte
        report(nbytes)


def _finish(job: Job, records: list[UnitRecord]) -> tuple[Manifest, dict[str, bytes]]:
    base_digests: dict[str, str] = {}
    expert_digests: dict[str, str] = {}
    for record in records:
        base_digests |= record.base_digests
        expert_digests |= record.expert_digests
    base, expert = job.base.source, job.expert.source
    shards = tuple(record.shard for record in records)
    side_files = dict(job.side_files)
    side_files[MODEL_CARD] = model_card(
        base_id=base.id,
        expert_id=expert.id,
        bits=None if job.settings.has_budget else job.settings.bits,
        nbytes=sum(shard.nbytes for shard in shards),
        expert_nbytes=job.expert.nbytes,
        facts=job.settings.to_dict(),
    )
    manifest = Manifest(
        base=ModelReference(base.id, base.revision, fingerprint(base_digests)),
        expert=ModelReference(expert.id, expert.revision, fingerprint(expert_digests)),
        model_type=job.plan.architecture.model_type,
        num_layers=job.plan.architecture.num_layers,
        dtype=dtype_name(stored_dtype(job.expert)),
        settings=job.settings.to_dict() | ({"expected": dict(job.choice.expected)} if job.choice else {}),
        tensors=tuple(entry for record in records for entry in record.tensors),
        unchanged=tuple(name for record in records for name in record.unchanged),
        shards=shards,
        files=tuple(
            FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(side_files.items())
        ),
        config_differences=json.loads(json.dumps(job.config_differences()), parse_constant=str),  # NaN is not JSON
        created_with=f"meswitch {__version__}",
    )
    return manifest, side_files
