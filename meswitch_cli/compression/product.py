"""Whether a fine-tune is a merged LoRA: its base plus products of a low rank, rounded; and of which rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.low_rank import Found
from meswitch_cli.compression.pairs import TensorPair
from meswitch_cli.compression.sample import by_projection, some_rows, spread
from meswitch_cli.delta.rank import MOST_LEFT_OF_ONE, NOTHING, RANKS, Left, left_by_rank
from meswitch_cli.delta.stored import StoredDelta
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.matching import Plan, PlannedTensor

#: Weights of a tensor that are asked: rows enough that 128 directions say something of them.
ASKED_WEIGHTS = 1 << 22


def product_rank(base: Checkpoint, expert: Checkpoint, plan: Plan) -> int | None:
    """The least of `RANKS` whose products explain every linear of an expert; None where none does, or none changed.

    A few linears are asked first, so that what is no LoRA is known soon; then all of them.

    Raises:
        CheckpointError: a weight cannot be read, is NaN or infinite.
    """
    linears = [item for item in plan.tensors if item.kind == "linear"]
    first = [item for items in by_projection(linears).values() for item in spread(items)]
    some = _Explained(RANKS)
    if not some.by(first, base, expert):
        return None
    likely = some.rank
    # A tensor that was not asked yet may be of a rank one higher; that others are, too, is not worth the time.
    ranks = RANKS if likely is None else RANKS[RANKS.index(likely) :][:2]
    known = {item.name for item in first}
    rest = _Explained(ranks, some)
    return rest.rank if rest.by([item for item in linears if item.name not in known], base, expert) else None


def is_rounded(base: torch.Tensor, expert: torch.Tensor) -> bool:
    """Whether an expert's tensor is the base's, rounded to its type."""
    return base.shape == expert.shape and torch.equal(base.to(expert.dtype), expert)


def nothing_of_rounded(pair: TensorPair) -> Found | None:
    """What is stored of a pair that differs by rounding to the expert's type alone, which restoring does anyway; of any
    other None."""
    return (StoredDelta(), {}) if is_rounded(pair.base, pair.expert) else None


class _Explained:
    """What products of some ranks leave of the tensors that were asked, and which of them explain each of these.

    A rank that is half of a tensor's or more is not low: it explains whatever was done to that tensor.
    """

    def __init__(self, ranks: Sequence[int], earlier: _Explained | None = None) -> None:
        self._left: dict[int, Left] = {rank: earlier._left[rank] if earlier else NOTHING for rank in ranks}
        self._open: list[int] = [rank for rank in ranks if earlier is None or rank in earlier._open]

    def by(self, items: Iterable[PlannedTensor], base: Checkpoint, expert: Checkpoint) -> bool:
        """Ask further tensors; False as soon as one is explained by none of the ranks."""
        for item in items:
            own, tuned = item.base.read(base), item.expert.read(expert)
            if is_rounded(own, tuned):
                continue
            own, tuned = (some_rows(tensor, ASKED_WEIGHTS) for tensor in (own, tuned))
            try:
                found = left_by_rank(own, tuned, list(self._left))
            except FloatingPointError as error:
                raise CheckpointError(f"{item.name}: NaN or infinity in {expert.source.path}") from error
            for rank, left in zip(self._left, found, strict=True):
                self._left[rank] += left
                is_low = 2 * rank < min(item.shape)
                if rank in self._open and not (is_low and left.is_rounding(MOST_LEFT_OF_ONE)):
                    self._open.remove(rank)
            if not self._open:
                return False
        return True

    @property
    def rank(self) -> int | None:
        """The least rank that explains each tensor, and all of them together; None where nothing changed."""
        explain = [rank for rank in self._open if self._left[rank].delta and self._left[rank].is_rounding()]
        return min(explain, default=None)
