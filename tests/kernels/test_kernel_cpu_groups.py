"""Tokens by slot as the CPU kernels take them."""

import torch

from meswitch_kernels.cpu_groups import PREFILL_TOKENS, group_tokens


def slots(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def test_few_tokens_are_listed_group_by_group():
    groups = group_tokens(slots(2, -1, 2, 0))
    assert groups.slots == (2, -1, 0)
    assert groups.many == ()
    assert groups.few.tokens == 4
    assert groups.few.groups == 3
    # Places, then slots, then (slot, first, count) of each group.
    assert list(groups.few.numbers) == [0, 2, 1, 3, 2, 2, -1, 0, 2, 0, 2, -1, 2, 1, 0, 3, 1]


def test_many_neighbours_are_a_slice_and_others_an_index():
    many = PREFILL_TOKENS
    groups = group_tokens(slots(*[1] * many, *[-1, 0] * many, 2))
    (first, together), (base, of_base), (other, of_other) = groups.many
    assert (first, base, other) == (1, -1, 0)
    assert together == slice(0, many)
    assert of_base.tolist() == list(range(many, 3 * many, 2))
    assert of_other.tolist() == list(range(many + 1, 3 * many, 2))
    assert list(groups.few.numbers) == [3 * many, 2, 2, 0, 1]


def test_slots_can_be_left_out():
    groups = group_tokens(slots(0, 1, 0), left_out={0})
    assert groups.slots == (1,)
    assert list(groups.few.numbers) == [1, 1, 1, 0, 1]


def test_no_tokens():
    groups = group_tokens(slots())
    assert groups.slots == groups.many == ()
    assert groups.few is None
