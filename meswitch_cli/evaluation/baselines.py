"""Other methods' deltas, for comparison."""

from __future__ import annotations

import torch


def bitdelta_start(delta: torch.Tensor) -> torch.Tensor:
    """BitDelta before distillation: the sign of each entry times the matrix's mean magnitude (arXiv 2402.10193, eq. 3).

    `delta` is `[out, in]`; entries that are zero count as negative, as in its packed form.
    """
    signs = torch.where(delta > 0, 1.0, -1.0)
    return signs * delta.abs().mean()
