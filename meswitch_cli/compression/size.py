"""How large an artifact will be, from metadata alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from meswitch_cli.delta.stored import expected_entry
from meswitch_cli.model.adapted import AdaptedCheckpoint

if TYPE_CHECKING:
    from meswitch_cli.compression.plan import Job


def expected_bytes(job: Job) -> int:
    """Bytes of the tensors, if every tensor differs from the base's (headers and side files not counted); of a job with
    a budget, that."""
    total = 0
    if job.budget is not None:
        return job.budget
    for item in job.plan.tensors:
        if isinstance(job.expert, AdaptedCheckpoint):
            adapted = job.expert.parameters[item.expert.parameter.name]
            if not adapted.changed:
                continue
            if adapted.rank and not adapted.scales_rows and adapted.saved is None:
                total += adapted.rank * (sum(item.shape) * (job.settings.factor_bits or 0) // 8 + 8)
                continue
        settings = job.settings_of(item)
        itemsize = item.expert.info(job.expert).dtype.itemsize
        if settings is None:
            total += math.prod(item.shape) * itemsize
        else:
            total += expected_entry(settings, item.shape, item.base_shape).expected_nbytes(itemsize)
    return total
