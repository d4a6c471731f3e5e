"""Cutting a delta as vLLM cuts weights: none of it needs vLLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.vllm.shards import Shard
from meswitch_kernels import Capacity, ExpertBank, ExpertDelta
from meswitch_kernels.packing import group_count, pack_codes

OUT, IN, RANK = 24, 192, 5


def random_delta(bits: int, group_size: int) -> ExpertDelta:
    generator = torch.Generator().manual_seed(bits + group_size)
    codes = torch.randint(0, 2**bits, (OUT, IN), generator=generator)
    return ExpertDelta(
        bits=bits,
        codes=pack_codes(codes, bits),
        steps=torch.rand(OUT, group_count(IN, group_size), generator=generator),
        group_size=group_size,
        salient_index=torch.tensor([3, 95, 96, 190], dtype=torch.int32),
        salient_value=torch.randn(OUT, 4, generator=generator),
        channel_scale=torch.rand(IN, generator=generator).half(),
        left=torch.randn(OUT, RANK, generator=generator),
        right=torch.randn(RANK, IN, generator=generator),
    )


def dense(delta: ExpertDelta, shape: tuple[int, int], whole: Capacity) -> torch.Tensor:
    bank = ExpertBank(1, shape[1], shape[0], whole, torch.float32, "cpu")
    bank.load(0, delta)
    return bank.dequantize(0)


def capacity(bits: int, group_size: int) -> Capacity:
    return Capacity(bits=bits, group_size=group_size, salient=4, rank=RANK, channel_scale=True)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [0, 32, 64, 96])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_columns_put_together_are_the_whole(bits: int, group_size: int, ranks: int) -> None:
    delta, room = random_delta(bits, group_size), capacity(bits, group_size)
    whole = dense(delta, (OUT, IN), room)
    width = IN // ranks
    parts = []
    for rank in range(ranks):
        shard = Shard((OUT, IN), ((0, OUT),), (rank * width, (rank + 1) * width))
        parts.append(dense(shard.cut(delta), shard.own_shape, shard.capacity(room)))
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_columns_that_begin_within_a_word(bits: int) -> None:
    delta, room = random_delta(bits, 0), capacity(bits, 0)
    whole = dense(delta, (OUT, IN), room)
    for start, stop in ((0, 36), (36, 100), (100, IN)):
        shard = Shard((OUT, IN), ((0, OUT),), (start, stop))
        assert torch.equal(dense(shard.cut(delta), shard.own_shape, shard.capacity(room)), whole[:, start:stop])


@pytest.mark.parametrize(
    "rows", [((0, 8),), ((16, 24),), ((0, 4), (8, 12), (20, 24))], ids=["first", "last", "several"]
)
def test_rows_are_those_of_the_whole(rows: tuple[tuple[int, int], ...]) -> None:
    delta, room = random_delta(2, 64), capacity(2, 64)
    shard = Shard((OUT, IN), rows, (0, IN))
    cut = dense(shard.cut(delta), shard.own_shape, shard.capacity(room))
    assert torch.equal(cut, dense(delta, (OUT, IN), room)[shard.row_places])
    assert torch.equal(shard.of_rows(torch.arange(OUT)), shard.row_places)


def test_a_cut_between_channels_of_one_step_is_refused() -> None:
    shard = Shard((OUT, IN), ((0, OUT),), (48, 96))
    with pytest.raises(EngineError, match="cut at channel 48"):
        shard.cut(random_delta(2, 32))
    with pytest.raises(EngineError, match="another number of tensor-parallel ranks"):
        shard.capacity(capacity(2, 32))


def test_rows_that_an_expert_added_are_where_the_last_rows_are() -> None:
    delta = replace(random_delta(2, 0), added_rows=torch.ones(3, IN))
    room = replace(capacity(2, 0), added_rows=3)
    first, last = Shard((OUT, IN), ((0, 16),), (0, IN)), Shard((OUT, IN), ((16, OUT),), (0, IN))
    assert first.cut(delta).added_rows is None and first.capacity(room).added_rows == 0
    assert last.cut(delta).added_rows is delta.added_rows and last.capacity(room).added_rows == 3


@pytest.mark.parametrize("columns", [(0, 96), (96, 192)])
def test_a_low_rank_part_alone(columns: tuple[int, int]) -> None:
    delta = replace(ExpertDelta.of_nothing(IN, OUT), left=random_delta(2, 0).left, right=random_delta(2, 0).right)
    room = Capacity(rank=RANK)
    whole = dense(delta, (OUT, IN), room)
    shard = Shard((OUT, IN), ((0, OUT),), columns)
    cut = dense(shard.cut(delta), shard.own_shape, shard.capacity(room))
    assert whole.any() and torch.equal(cut, whole[:, slice(*columns)])
