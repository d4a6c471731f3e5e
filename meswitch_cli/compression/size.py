"""How large an artifact will be, from metadata alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from meswitch_cli.delta.stored import expected_entry

if TYPE_CHECKING:
    from meswitch_cli.compression.plan import Job


def expected_bytes(job: Job) -> int:
    """Bytes of the tensors, if every tensor differs from the base's (headers and side files not counted)."""
    total, by_kind = 0, job.settings.by_kind()
    for item in job.plan.tensors:
        settings = by_kind.get(item.kind)
        itemsize = item.expert.info(job.expert).dtype.itemsize
        if settings is None:
            total += math.prod(item.shape) * itemsize
        else:
            total += expected_entry(settings, item.shape, item.base_shape).expected_nbytes(itemsize)
    return total
