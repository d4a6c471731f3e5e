import pytest
import torch

from meswitch_cli.token_batches import batches_by_length, padded


@pytest.mark.parametrize("longest_first", [False, True])
def test_batches_hold_every_index_once_within_the_budget(longest_first: bool) -> None:
    lengths = [5, 90, 1, 40, 40, 3, 200]
    batches = batches_by_length(lengths, 100, longest_first=longest_first)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 100 for batch in batches)
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=longest_first)


def test_batches_by_hand() -> None:
    lengths = [5, 90, 1, 40, 40, 3, 200]
    assert batches_by_length(lengths, 100) == [[2, 5, 0], [3, 4], [1], [6]]
    assert batches_by_length(lengths, 100, longest_first=True) == [[6], [1], [4, 3], [0, 5, 2]]
    assert batches_by_length([], 100) == []


def test_padding_is_on_the_right_and_not_in_the_mask() -> None:
    inputs, mask = padded([[5, 6, 7], [8]])
    assert torch.equal(inputs, torch.tensor([[5, 6, 7], [8, 0, 0]]))
    assert torch.equal(mask, torch.tensor([[True, True, True], [True, False, False]]))
