"""The whole of `meswitch compress`: two checkpoints to a finished artifact, unit by unit, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch_cli import __version__
from meswitch_cli.artifact.manifest import FileEntry, Manifest, ModelReference, shard_name
from meswitch_cli.artifact.sidefiles import MODEL_CARD, expert_files, model_card
from meswitch_cli.artifact.workspace import UnitRecord, Workspace, workspace
from meswitch_cli.calibration.data import CalibrationFile, random_window, token_windows
from meswitch_cli.calibration.stream import OnLayer, stream_statistics
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import fingerprint, tensor_digest
from meswitch_cli.checkpoint.plan import Plan, PlannedTensor, config_differences, make_plan
from meswitch_cli.compression.closeness import WeakDeltaError, refuse_weak
from meswitch_cli.compression.distill import distill
from meswitch_cli.compression.pairs import PairReader, Source, TensorPair, expert_first, pair_by_pair
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.compression.tokenizer import load_tokenizer, tokenizer_note
from meswitch_cli.compression.unit import compress_unit
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import ArtifactError, UsageError

#: Called with (what is being done, bytes of the checkpoints handled by it, units done).
OnProgress = Callable[[str, int, int], None]

_QUANTISED = "unit"
_FINAL = "final"


@dataclass(frozen=True)
class Job:
    """A compression that metadata says can be done."""

    base: Checkpoint
    expert: Checkpoint
    plan: Plan
    settings: CompressionSettings
    calibration: CalibrationFile | None
    out: Path
    side_files: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of weights that will be read."""
        return sum(_unit_bytes(self, unit) for unit in self.plan.units)

    def notes(self) -> list[str]:
        """What is odd about the two checkpoints, and does not keep them from being compressed."""
        rows = [item.shape[0] for item in self.plan.tensors if item.kind == "embedding"]
        tokenizer = tokenizer_note(self.expert.source.path, rows[0]) if rows else None
        return list(dict.fromkeys([*self.base.notes, *self.expert.notes, *([tokenizer] if tokenizer else [])]))

    def config_differences(self) -> dict[str, tuple[Any, Any]]:
        return config_differences(self.base.config, self.expert.config)


def _unit_bytes(job: Job, unit: tuple[PlannedTensor, ...]) -> int:
    return sum(
        job.base.tensors[item.base_stored].nbytes + job.expert.tensors[item.expert_stored].nbytes for item in unit
    )


def prepare(
    base: str, expert: str, out: Path, settings: CompressionSettings, calibration: CalibrationFile | None
) -> Job:
    """Open both checkpoints and match them on metadata alone.

    Raises:
        CheckpointError: one of them cannot be used, or they do not belong together.
        UsageError: more salient channels asked for than a layer has inputs.
    """
    opened_base, opened_expert = Checkpoint.open(base), Checkpoint.open(expert)
    plan = make_plan(opened_base, opened_expert)
    linears = [item for item in plan.tensors if item.kind == "linear"]
    narrowest = min(linears, key=lambda item: item.shape[1], default=None)
    if narrowest is not None and settings.salient > narrowest.shape[1]:
        raise UsageError(f"--salient {settings.salient}: {narrowest.name} has only {narrowest.shape[1]} input channels")
    side_files = expert_files(opened_expert.source.path, opened_expert.config)
    return Job(opened_base, opened_expert, plan, settings, calibration, out, side_files)


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
        WeakDeltaError: the result is farther from the expert than the base is; `keep_weak` makes it a note.
    """
    with workspace(job.out, force=force) as space:
        _continue_or_start(job, space, force)
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
    identity = {
        "version": __version__,
        "settings": job.settings.to_dict(),
        "base_files": job.base.stat_digest(),
        "expert_files": job.expert.stat_digest(),
    }
    earlier = space.identity()
    if earlier is None:
        space.begin(identity)
        return
    changes = job.settings.changes_from(earlier["settings"])
    if earlier["version"] != __version__:
        changes.append(f"meswitch: {earlier['version']} -> {__version__}")
    for name, checkpoint in (("base", job.base), ("expert", job.expert)):
        if earlier[f"{name}_files"] != identity[f"{name}_files"]:
            changes += _changed_weights(job, space, name, checkpoint)
    if changes and force:
        space.begin(identity)
        return
    if changes:
        raise ArtifactError(
            f"{job.out}: unfinished work there was begun with other inputs ({'; '.join(changes)}). "
            "Run the earlier command to finish it, or give --force to start over"
        )
    space.set_identity(identity)


def _changed_weights(job: Job, space: Workspace, which: str, checkpoint: Checkpoint) -> list[str]:
    """Files were touched since: compare the weights that finished units were made from."""
    for index, unit in enumerate(job.plan.units):
        record = space.record(index, _QUANTISED)
        if record is None:
            continue
        known = record.base_digests if which == "base" else record.expert_digests
        for item in unit:
            name, stored = (
                (item.base_name, item.base_stored) if which == "base" else (item.expert_name, item.expert_stored)
            )
            if known[name] != tensor_digest(name, checkpoint.read(stored)):
                return [f"{which}: tensor {stored!r} is not what it was"]
    return []


def _quantise(job: Job, space: Workspace, device: torch.device | str, on_progress: OnProgress) -> list[UnitRecord]:
    """Bring every unit to its quantised state and return the records."""
    units = job.plan.units
    records = {index: record for index in range(len(units)) if (record := space.record(index, _QUANTISED))}
    done = len(records)
    for index in records:
        on_progress("resumed", _unit_bytes(job, units[index]), done)

    def finish(index: int, pairs: Iterator[TensorPair], statistics: Mapping[str, InputStatistics]) -> None:
        shard = shard_name(index, len(units))
        if job.settings.steps == "distill":
            shard = f"quantised-{shard}"
        counted = _counting(pairs, lambda nbytes: on_progress("compress", nbytes, len(records)))
        data, record = compress_unit(counted, shard, job.settings, statistics, device)
        space.finish_unit(index, _QUANTISED, data, record)
        records[index] = record
        on_progress("compress", 0, len(records))

    missing = [index for index in range(len(units)) if index not in records]
    calibrated = bool(missing) and job.settings.calibration is not None
    with PairReader(job.base, job.expert, _reading_order(units, missing, calibrated)) as reader:

        def finish_if_missing(index: int, statistics: Mapping[str, InputStatistics]) -> None:
            if index in missing:
                finish(index, (reader.pair(item) for item in units[index]), statistics)
            else:
                reader.forget(units[index])

        if calibrated:

            def on_layer(index: int, statistics: dict[str, InputStatistics]) -> None:
                on_progress("calibrate", 0, index)
                finish_if_missing(index, statistics)

            finish_if_missing(len(units) - 1, _statistics(job, reader, on_layer, device))
        for index in [index for index in missing if index not in records]:
            finish_if_missing(index, {})
    return [records[index] for index in range(len(units))]


def _reading_order(
    units: tuple[tuple[PlannedTensor, ...], ...], missing: list[int], calibrated: bool
) -> Iterator[Source]:
    """The tensors in the order in which `_quantise` asks for them; calibration runs the finished layers as well."""
    for index, unit in enumerate(units):
        if calibrated and index < len(units) - 1:
            yield from expert_first(unit, pairs=index in missing)
        elif index in missing:
            yield from pair_by_pair(unit)


def _statistics(
    job: Job, reader: PairReader, on_layer: OnLayer, device: torch.device | str
) -> dict[str, InputStatistics]:
    """Calibrate; `on_layer` hears of the layers in order, the head's statistics are returned."""
    random = job.settings.calibration == RANDOM
    common = _common_dtype(job.expert)
    in_layers = {item.expert_stored: item for unit in job.plan.units[:-1] for item in unit}

    def read(stored: str) -> torch.Tensor:
        return reader.expert(in_layers[stored]) if stored in in_layers else job.expert.read(stored)

    return stream_statistics(
        job.expert,
        job.plan.architecture,
        calibration_windows(job),
        on_layer,
        gram=job.settings.takes_gram,
        keep=random,
        device=device,
        dtype=torch.bfloat16 if random and common == "bfloat16" else None,  # few tokens: reading weights is the cost
        read=read,
    )


def calibration_windows(job: Job) -> torch.Tensor:
    """The calibration file as token windows of the expert's own tokenizer, `[n, sequence_length]`; or random tokens."""
    vocabulary = next(item.shape[0] for item in job.plan.tensors if item.kind == "embedding")
    if job.settings.calibration == RANDOM:
        return random_window(vocabulary, job.settings.seed)
    assert job.calibration is not None
    tokenizer = load_tokenizer(job.expert.source.path)
    windows = token_windows(
        job.calibration,
        tokenizer,
        samples=job.settings.samples,
        sequence_length=job.settings.sequence_length,
        seed=job.settings.seed,
    )
    if int(windows.max()) >= vocabulary:
        raise UsageError(
            f"{job.expert.source.path}: its tokenizer gives token {int(windows.max())}, its embedding has "
            f"{vocabulary} rows; tokenizer and weights do not belong together"
        )
    return windows


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
        bits=job.settings.bits,
        nbytes=sum(shard.nbytes for shard in shards),
        expert_nbytes=job.expert.nbytes,
        facts=job.settings.to_dict(),
    )
    manifest = Manifest(
        base=ModelReference(base.id, base.revision, fingerprint(base_digests)),
        expert=ModelReference(expert.id, expert.revision, fingerprint(expert_digests)),
        model_type=job.plan.architecture.model_type,
        num_layers=job.plan.architecture.num_layers,
        dtype=_common_dtype(job.expert),
        settings=job.settings.to_dict(),
        tensors=tuple(entry for record in records for entry in record.tensors),
        unchanged=tuple(name for record in records for name in record.unchanged),
        shards=shards,
        files=tuple(
            FileEntry(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(side_files.items())
        ),
        config_differences={key: list(values) for key, values in job.config_differences().items()},
        created_with=f"meswitch {__version__}",
    )
    return manifest, side_files


def _common_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of a checkpoint's bytes are in."""
    totals: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
    return str(max(totals, key=lambda dtype: totals[dtype])).removeprefix("torch.")
