"""What is stored of a pair where the expert is to come back bit for bit."""

from __future__ import annotations

import torch

from meswitch_cli.compression.low_rank import Found
from meswitch_cli.compression.pairs import TensorPair, refuse_non_finite
from meswitch_cli.delta.exact import encode
from meswitch_cli.delta.stored import StoredDelta


def stream_of(pair: TensorPair) -> Found:
    """The stream that makes the expert's tensor of the base's; nothing of one that has the same type and bits.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    base, expert, rows = pair.base, pair.expert, pair.planned.shared_rows
    if pair.planned.shape == pair.planned.base_shape:
        if base.dtype == expert.dtype and _same_bits(base, expert):
            return StoredDelta(), {}
        refuse_non_finite(pair)
        return StoredDelta(exact=encode(base, expert)), {}
    refuse_non_finite(pair)
    if pair.planned.kind == "dense":
        return StoredDelta(value=expert), {}
    added = expert[rows:]
    stream = encode(base[:rows], expert[:rows])
    return StoredDelta(exact=stream, added_rows=added.clone() if len(added) else None), {}


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    one, other = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(one, other)
