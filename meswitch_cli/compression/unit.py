"""Compressing one unit: a decoder layer, or everything outside the layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from meswitch_cli.artifact.manifest import FileEntry, TensorEntry
from meswitch_cli.artifact.shard import delta_tensors, encode_shard
from meswitch_cli.artifact.workspace import UnitRecord
from meswitch_cli.checkpoint.plan import PlannedTensor
from meswitch_cli.compression.pairs import TensorPair
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import CheckpointError

#: Code width of a delta that may be as large as the weight itself: it leaves 1 % of its energy as error, not 12 %.
UNRELATED_BITS = 4


def tensor_settings(planned: PlannedTensor, settings: CompressionSettings) -> QuantizerSettings | None:
    """How a tensor is quantised; None for one that is stored whole."""
    if planned.kind == "linear":
        return settings.linears()
    if planned.kind == "head":
        own = settings.head()
        # Against the embedding of a base that ties its head, an untied head may have nothing in common with it.
        return replace(own, bits=max(own.bits, UNRELATED_BITS)) if planned.base_name != planned.name else own
    return settings.embedding() if planned.kind == "embedding" else None


def compress_unit(
    pairs: Iterable[TensorPair],
    shard: str,
    settings: CompressionSettings,
    statistics: Mapping[str, InputStatistics],
    device: torch.device | str,
) -> tuple[bytes, UnitRecord]:
    """Compress a unit's tensors into the bytes of its shard.

    Raises:
        CheckpointError: a weight is NaN or infinite (the tensor and the model are named).
    """
    stored: dict[str, torch.Tensor] = {}
    entries: list[TensorEntry] = []
    unchanged: list[str] = []
    base_digests: dict[str, str] = {}
    expert_digests: dict[str, str] = {}
    for pair in pairs:
        base_digests[pair.planned.base_name] = pair.base_digest
        expert_digests[pair.planned.expert_name] = pair.expert_digest
        entry, tensors = _compress_tensor(pair, shard, settings, statistics, device)
        if entry is None:
            unchanged.append(pair.planned.name)
        else:
            entries.append(entry)
            stored |= tensors
        del pair  # its memory serves the next one
    data, file = shard_file(stored, shard)
    return data, UnitRecord(file, tuple(entries), tuple(unchanged), base_digests, expert_digests)


def shard_file(tensors: Mapping[str, torch.Tensor], name: str) -> tuple[bytes, FileEntry]:
    """The bytes of a shard, and how a manifest lists it."""
    data = encode_shard(tensors)
    return data, FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def _compress_tensor(
    pair: TensorPair,
    shard: str,
    settings: CompressionSettings,
    statistics: Mapping[str, InputStatistics],
    device: torch.device | str,
) -> tuple[TensorEntry | None, dict[str, torch.Tensor]]:
    planned, name = pair.planned, pair.planned.name
    quantizer = tensor_settings(planned, settings)
    if quantizer is None:
        _refuse_non_finite(pair)
        if planned.shape == planned.base_shape and torch.equal(pair.base.float(), pair.expert.float()):
            return None, {}
        tensors = {f"{name}.value": pair.expert}
        return planned_entry(planned, shard, tensors), tensors
    rows = planned.shared_rows
    try:
        result = quantize(pair.base[:rows], pair.expert[:rows], quantizer, statistics.get(name), device)
    except FloatingPointError as error:
        _refuse_non_finite(pair)
        raise CheckpointError(f"{pair.expert_file}: tensor {name!r}: its delta is beyond fp32") from error
    added = pair.expert[rows:]
    tensors = delta_tensors(name, result[0]) if result else {}
    if len(added):
        _refuse_non_finite(pair)
        tensors[f"{name}.added_rows"] = added.clone()
    if not tensors and planned.shape == planned.base_shape:
        return None, {}
    if result is None:
        return planned_entry(planned, shard, tensors), tensors
    delta, error_ = result
    entry = planned_entry(
        planned,
        shard,
        tensors,
        bits=delta.bits,
        salient=delta.salient_index.numel(),
        group_size=delta.group_size,
        channel_scale=delta.channel_scale is not None,
        rank=len(delta.low_rank.left_steps) if delta.low_rank else 0,
        delta_energy=error_.delta_energy,
        weight_error=error_.weight_error,
        output_error=error_.output_error,
    )
    return entry, tensors


def planned_entry(
    planned: PlannedTensor,
    shard: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    bits: int = 0,
    salient: int = 0,
    group_size: int = 0,
    channel_scale: bool = False,
    rank: int = 0,
    delta_energy: float | None = None,
    weight_error: float | None = None,
    output_error: float | None = None,
) -> TensorEntry:
    """The manifest's entry for a planned tensor that is stored as `tensors`."""
    return TensorEntry(
        name=planned.name,
        kind=planned.kind,
        shape=planned.shape,
        base=planned.base_name,
        base_shape=planned.base_shape,
        layer=planned.layer,
        shard=shard,
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        bits=bits,
        salient=salient,
        group_size=group_size,
        channel_scale=channel_scale,
        rank=rank,
        added_rows=0 if planned.kind == "dense" else planned.shape[0] - planned.shared_rows,
        delta_energy=delta_energy,
        weight_error=weight_error,
        output_error=output_error,
    )


def _refuse_non_finite(pair: TensorPair) -> None:
    for tensor, file, name in (
        (pair.base, pair.base_file, pair.planned.base_stored),
        (pair.expert, pair.expert_file, pair.planned.expert_stored),
    ):
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {name!r} holds NaN or infinity: the checkpoint is damaged")
