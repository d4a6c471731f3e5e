"""Compressing one unit: a decoder layer, or everything outside the layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from meswitch_cli.artifact.manifest import FileEntry
from meswitch_cli.artifact.shard import encode_shard
from meswitch_cli.artifact.workspace import UnitRecord
from meswitch_cli.compression.low_rank import Found
from meswitch_cli.compression.pairs import TensorPair, refuse_non_finite
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.delta.stored import StoredDelta, TensorEntry
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.matching import PlannedTensor


def compress_unit(
    pairs: Iterable[TensorPair],
    shard: str,
    settings_of: Callable[[PlannedTensor], QuantizerSettings | None],
    statistics: Mapping[str, InputStatistics],
    device: torch.device | str,
    known: Callable[[TensorPair], Found | None] | None = None,
) -> tuple[bytes, UnitRecord]:
    """Compress a unit's tensors into the bytes of its shard; one without settings is stored whole, and of some `known`
    tells what is stored, without coding.

    Raises:
        CheckpointError: a weight is NaN or infinite (the tensor and the model are named).
    """
    stored: dict[str, torch.Tensor] = {}
    entries: list[TensorEntry] = []
    unchanged: list[str] = []
    base_digests: dict[str, str] = {}
    expert_digests: dict[str, str] = {}
    for pair in pairs:
        base_digests[pair.planned.base.parameter.name] = pair.base_digest
        expert_digests[pair.planned.expert.parameter.name] = pair.expert_digest
        found = known(pair) if known else None
        found = found or _compress_tensor(pair, settings_of(pair.planned), statistics, device)
        if found is None or (not found[0].tensors and pair.planned.shape == pair.planned.base_shape):
            unchanged.append(pair.planned.name)
        else:
            delta, errors = found
            entries.append(_entry(pair.planned, shard, delta, errors))
            stored |= delta.named(pair.planned.name)
        del pair  # its memory serves the next one
    data, file = shard_file(stored, shard)
    return data, UnitRecord(file, tuple(entries), tuple(unchanged), base_digests, expert_digests)


def shard_file(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[bytes, FileEntry]:
    """The bytes of a shard, and how a manifest lists it."""
    data = encode_shard(tensors)
    return data, FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def _compress_tensor(
    pair: TensorPair,
    quantizer: QuantizerSettings | None,
    statistics: Mapping[str, InputStatistics],
    device: torch.device | str,
) -> tuple[StoredDelta, dict[str, Any]] | None:
    """What is stored of a tensor, and how far it is off; None where it equals the base's."""
    planned, name = pair.planned, pair.planned.name
    if quantizer is None:
        refuse_non_finite(pair)
        if planned.shape == planned.base_shape and torch.equal(pair.base.float(), pair.expert.float()):
            return None
        return StoredDelta(value=pair.expert), {}
    rows = planned.shared_rows
    try:
        result = quantize(pair.base[:rows], pair.expert[:rows], quantizer, statistics.get(name), device)
    except FloatingPointError as error:
        refuse_non_finite(pair)
        raise CheckpointError(f"{pair.expert_file}: tensor {name!r}: its delta is beyond fp32") from error
    if result is None and planned.shape == planned.base_shape:
        return None
    delta, errors = (result[0], asdict(result[1])) if result else (StoredDelta(), {})
    added = pair.expert[rows:]
    if len(added):
        refuse_non_finite(pair)
        delta = replace(delta, added_rows=added.clone())
    return delta, errors


def _entry(planned: PlannedTensor, shard: str, delta: StoredDelta, errors: dict[str, Any]) -> TensorEntry:
    """The manifest's entry for a planned tensor of which `delta` is stored."""
    return TensorEntry(
        name=planned.name,
        kind=planned.kind,
        shape=planned.shape,
        base=planned.base.parameter.name,
        base_shape=planned.base_shape,
        layer=planned.layer,
        shard=shard,
        **delta.stored_as,
        **errors,
    )
