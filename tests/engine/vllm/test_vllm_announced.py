"""What layers read of a pass of vLLM's is where it was: none of it needs vLLM."""

from __future__ import annotations

import pytest
import torch

from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.vllm.announced import AnnouncedTokens

CPU = torch.device("cpu")


@pytest.fixture
def announced() -> AnnouncedTokens:
    return AnnouncedTokens(3, 32, 8, CPU, kernels(CPU, torch.float32))


def test_tensors_stay_where_they_are_and_end_with_the_base(announced: AnnouncedTokens) -> None:
    """A captured graph reads them at their addresses, for more tokens than were announced."""
    tensors = (announced.slot_of_token, announced.slot_of_row, announced.gain_rows)
    places = [tensor.data_ptr() for tensor in tensors]
    announced.announce([0, 0, 2, -1], [0, 2, -1])
    assert announced.slot_of_token[:6].tolist() == [0, 0, 2, -1, -1, -1]
    announced.announce([1], [1])
    assert [tensor.data_ptr() for tensor in tensors] == places
    assert announced.slot_of_token.tolist() == [1] + [-1] * 31
    assert announced.slot_of_row.tolist() == [1] + [-1] * 7
    assert announced.gain_rows.tolist() == [2] + [0] * 31


def test_padding_is_the_bases(announced: AnnouncedTokens) -> None:
    announced.announce([2, 2, 0], [2, 0])
    batch = announced.batch(5)
    assert batch is not None and batch.slot_of_token.tolist() == [2, 2, 0, -1, -1]
    assert batch.slot_of_token.data_ptr() == announced.slot_of_token.data_ptr()
    assert announced.batch(5) is batch
    with pytest.raises(RuntimeError, match="2 tokens, 3 were announced"):
        announced.batch(2)


def test_a_pass_of_the_base_alone_is_none(announced: AnnouncedTokens) -> None:
    announced.announce([1, -1], [1, -1])
    assert announced.batch(2) is not None
    announced.announce([-1, -1], [-1, -1])
    assert announced.batch(2) is None and announced.rows(torch.zeros(2, 4)) is None
    assert announced.gain_rows[:2].tolist() == [0, 0]


def test_more_than_there_is_memory_for_is_refused(announced: AnnouncedTokens) -> None:
    with pytest.raises(RuntimeError, match="33 tokens and 1 rows"):
        announced.announce([0] * 33, [0])
    with pytest.raises(RuntimeError, match="9 rows"):
        announced.announce([0] * 9, [0] * 9)


def test_rows_of_logits_are_those_that_predict_or_tokens_where_they_lie(announced: AnnouncedTokens) -> None:
    announced.announce([0, 0, 0, 1, 1, -1], [0, 1, -1])
    hidden = torch.zeros(6, 4)
    predicting = announced.rows(hidden[torch.tensor([2, 4, 5])])
    assert predicting is not None and predicting.slot_of_token.tolist() == [0, 1, -1]
    of_prompt = announced.rows(hidden[2:5])
    assert of_prompt is not None and of_prompt.slot_of_token.tolist() == [0, 1, 1]
    with pytest.raises(RuntimeError, match="logits of 2 tokens, 3"):
        announced.rows(torch.zeros(2, 4))


def test_a_capture_has_a_batch_of_its_own_that_is_kept(announced: AnnouncedTokens, monkeypatch: object) -> None:
    """It is not planned by the slots of its capture, and its memory must not be given back."""
    announced.announce([0] * 8, [0])
    planned = announced.batch(8)
    captured = announced._batch(8, capturing=True)
    assert captured is not planned and announced._captured == [captured]
    announced.announce([1] * 8, [1])
    assert captured.slot_of_token.tolist() == [1] * 8
    assert announced._captured == [captured]
