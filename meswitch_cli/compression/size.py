"""How large an artifact will be, from metadata alone."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from meswitch_cli.artifact.shard import SHARD_NBYTES, header_nbytes
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import TensorEntry, expected_entry
from meswitch_cli.model.adapted import AdaptedCheckpoint

if TYPE_CHECKING:
    from meswitch_cli.compression.plan import Job
    from meswitch_cli.model.matching import PlannedTensor


def expected_bytes(job: Job) -> int:
    """Bytes of the weight files, headers with them, if every tensor differs from the base's; of a job with a budget,
    that."""
    if job.budget is not None:
        return job.budget
    entries = [(entry, item) for item in job.plan.tensors if (entry := _expected(job, item))]
    sizes = {item.name: item.expert.info(job.expert).dtype.itemsize for _, item in entries}
    digits = len(str(sum(entry.expected_nbytes(sizes[item.name]) for entry, item in entries)))
    return SHARD_NBYTES + sum(
        entry_nbytes(entry, sizes[item.name], named_like(item), digits) for entry, item in entries
    )


def entry_nbytes(entry: TensorEntry, itemsize: int, name: str, digits: int) -> int:
    """Bytes that an entry of this name takes in a file, its part of the header with them; offsets have at most so many
    digits, numbers of the expert's own so many bytes."""
    named = replace(entry, name=name)
    return named.expected_nbytes(itemsize) + header_nbytes(named, digits)


def named_like(item: PlannedTensor) -> str:
    """A name as long as the tensor's in a header."""
    return "x" * (len(json.dumps(item.name)) - 2)


def _expected(job: Job, item: PlannedTensor) -> TensorEntry | None:
    """The entry of a tensor that differs from the base's; None of one that an adapter leaves alone."""
    settings = job.settings_of(item)
    if isinstance(job.expert, AdaptedCheckpoint):
        adapted = job.expert.parameters[item.expert.parameter.name]
        if not adapted.changed:
            return None
        if adapted.rank and not adapted.scales_rows and adapted.saved is None:
            width = job.settings.factor_bits or 0
            settings = QuantizerSettings(bits=0, salient=0, rank=adapted.rank, factor_bits=width)
    if settings is None:
        return TensorEntry(name="", kind="dense", shape=item.shape, base="", base_shape=item.base_shape)
    return expected_entry(settings, item.shape, item.base_shape)
