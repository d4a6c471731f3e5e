"""How large an artifact will be, from metadata alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from meswitch_cli.artifact.shard import LOW_RANK_PARTS
from meswitch_cli.compression.unit import planned_entry, tensor_settings

if TYPE_CHECKING:
    from meswitch_cli.compression.plan import Job

_ITEM_BYTES = {"codes": 4, "steps": 4, "salient_index": 4, "salient_value": 2, "channel_scale": 2} | dict.fromkeys(
    LOW_RANK_PARTS, 4
)


def expected_bytes(job: Job) -> int:
    """Bytes of the tensors, if every tensor differs from the base's (headers and side files not counted)."""
    total = 0
    for item in job.plan.tensors:
        settings = tensor_settings(item, job.settings)
        itemsize = item.expert.info(job.expert).dtype.itemsize
        if settings is None:
            total += math.prod(item.shape) * itemsize
            continue
        entry = planned_entry(
            item,
            "",
            {},
            bits=settings.bits,
            salient=settings.salient,
            group_size=settings.group_size,
            channel_scale=settings.channel_scale == "rms",
            rank=min(settings.rank, item.shared_rows, item.shape[1]),
        )
        for name, shape in entry.stored_shapes().items():
            part = name.rpartition(".")[2]
            size = 2 if part == "steps" and settings.group_size else _ITEM_BYTES.get(part, itemsize)
            total += math.prod(shape) * size
    return total
