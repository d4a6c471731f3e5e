"""What a worker of several holds of a layer: rows of its outputs, or columns of its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meswitch_cli.delta.stored import StoredDelta
from meswitch_cli.engine.banks import Banks, bias_delta, expert_delta
from meswitch_cli.engine.contract import EngineError
from meswitch_kernels import Capacity, ExpertDelta
from meswitch_kernels.delta import GROUP_MULTIPLE
from meswitch_kernels.packing import codes_per_word, pack_codes, unpack_codes

Span = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """A part of a weight `[out, in]` that is cut by rows or by columns, as vLLM cuts the base's.

    Attributes:
        shape: of the whole weight.
        rows: from, and up to but not including; one after the other where a layer is several in one.
        columns: likewise, one span.
        biased: whether this part adds the bias: one of those that are cut by columns, whose outputs are added up.
    """

    shape: Span
    rows: tuple[Span, ...]
    columns: Span
    biased: bool = True

    @classmethod
    def whole(cls, shape: Span) -> Shard:
        return cls(shape, ((0, shape[0]),), (0, shape[1]))

    @property
    def own_shape(self) -> Span:
        return sum(stop - start for start, stop in self.rows), self.columns[1] - self.columns[0]

    @property
    def ends_whole(self) -> bool:
        """Whether the last rows are here, behind which those lie that an expert added to a vocabulary."""
        return self.rows[-1][1] == self.shape[0]

    @property
    def row_places(self) -> Tensor:
        """Its rows among those of the whole, int64."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.rows])

    def of_rows(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor `[out, ...]` that are here."""
        if self.rows == ((0, tensor.shape[0]),):
            return tensor
        parts = [tensor[start:stop] for start, stop in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def group_size(self, size: int) -> int:
        """The group size of a part whose whole has groups of `size`: a cut may fall into the middle of a group.

        Raises:
            EngineError: the cut falls between channels that share a step.
        """
        if not size or self.columns == (0, self.shape[1]):
            return size
        common = math.gcd(size, self.columns[0])
        if common % GROUP_MULTIPLE:
            raise EngineError(
                f"a weight of {self.shape[1]} input channels is cut at channel {self.columns[0]}, in the middle of "
                f"{GROUP_MULTIPLE} that share a step; serve with another number of tensor-parallel ranks"
            )
        return common

    def capacity(self, whole: Capacity) -> Capacity:
        """What a bank must hold of this part.

        Raises:
            EngineError: as `group_size`.
        """
        added = whole.added_rows if self.ends_whole else 0
        return replace(whole, group_size=self.group_size(whole.group_size), added_rows=added)

    def cut(self, delta: ExpertDelta) -> ExpertDelta:
        """This part of a delta of the whole weight; a bias is not its concern.

        Raises:
            EngineError: as `group_size`.
        """
        by_rows = replace(
            delta,
            codes=self.of_rows(delta.codes),
            steps=self.of_rows(delta.steps),
            salient_value=None if delta.salient_value is None else self.of_rows(delta.salient_value),
            left=None if delta.left is None else self.of_rows(delta.left),
            added_rows=delta.added_rows if self.ends_whole else None,
        )
        if self.columns == (0, self.shape[1]):
            return by_rows
        start, stop = self.columns
        size = self.group_size(delta.group_size)
        index, value = by_rows.salient_index, by_rows.salient_value
        if index is not None and value is not None:
            here = (index >= start) & (index < stop)
            index, value = index[here] - start, value[:, here.to(value.device)]
        return replace(
            by_rows,
            codes=_columns_of_codes(by_rows.codes, delta.bits, start, stop),
            steps=_columns_of_steps(by_rows.steps, delta.group_size, size, start, stop),
            group_size=size,
            salient_index=index,
            salient_value=value,
            channel_scale=None if delta.channel_scale is None else delta.channel_scale[start:stop],
            right=None if delta.right is None else delta.right[:, start:stop],
        )


class ShardedBanks(Banks):
    """Banks of the parts of layers that a worker holds: each layer has a `shard`."""

    def _delta(self, name: str, weight: StoredDelta, bias: Tensor | None) -> ExpertDelta:
        layer = self.base.layer(name)
        shard: Shard = layer.shard
        delta = shard.cut(expert_delta(weight, shard.shape, self.base.device))
        if bias is None or not shard.biased:
            return delta
        return replace(delta, bias_delta=bias_delta(shard.of_rows(bias), layer.bias))


def _columns_of_codes(codes: Tensor, bits: int, start: int, stop: int) -> Tensor:
    """Words `[out, words]` of the channels from `start` up to `stop`."""
    if not bits:
        return codes
    per_word = codes_per_word(bits)
    if start % per_word:
        return pack_codes(unpack_codes(codes, bits, stop)[:, start:], bits)
    words = codes[:, start // per_word : -(-stop // per_word)]
    spare = -stop % per_word
    if spare:  # the last word's other codes are channels of the next part
        words = pack_codes(unpack_codes(words, bits, stop - start), bits)
    return words


def _columns_of_steps(steps: Tensor, whole_size: int, size: int, start: int, stop: int) -> Tensor:
    if not whole_size:
        return steps
    finer = steps.repeat_interleave(whole_size // size, 1)
    return finer[:, start // size : -(-stop // size)]
