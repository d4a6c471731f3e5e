"""A training that is interrupted goes on where it was, and the choice of the layer that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meswitch_cli.router.backends.base import BaseHiddenStates
from meswitch_cli.router.backends.probe_fitting import best_layer, fisher_ratio
from meswitch_cli.router.backends.read_ahead import ReadBatches
from meswitch_cli.router.train.data import gather
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import TrainedRouter, train_router

from .conftest import COUNTS, examples

IDS = [[5, 6, 7], [8, 9], [10] * 5]


class Stopped(Exception):
    """Stands for Ctrl-C."""


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts prompts that go through a base's layers; a list that grows."""
    read: list[int] = []
    whole = BaseHiddenStates.__init__

    def counting(self: BaseHiddenStates, *arguments: Any, **named: Any) -> None:
        whole(self, *arguments, **named)
        self._model.register_forward_hook(lambda module, inputs, output: read.append(len(output[0])))

    monkeypatch.setattr(BaseHiddenStates, "__init__", counting)
    return read


def test_an_interrupted_training_goes_on_and_gives_the_same_bytes(
    base: Path, trained_probe: TrainedRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = forwards(monkeypatch)
    data, settings = gather(examples(COUNTS)), TrainingSettings(max_tokens=64)

    def stop_in_the_middle(what: str, done: int, total: int) -> None:
        if what == "hidden states" and done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        train_router(data, settings, base=str(base), read_ahead=tmp_path / "read", on_progress=stop_in_the_middle)
    before = sum(read)
    found = []
    for _ in range(2):
        read.clear()
        again = train_router(data, settings, base=str(base), read_ahead=tmp_path / "read")
        assert torch.equal(again.store.features, trained_probe.store.features)
        assert again.router.model.numbers() == trained_probe.router.model.numbers()
        found.append(sum(read))
    # The last one reads what the report asks of its router and nothing else; the one before, what was missing.
    assert before > len(again.store.labels) / 2
    assert found[0] - found[1] == len(again.store.labels) - before


def test_a_batch_is_taken_from_its_file_and_only_for_the_same_question(base: Path, tmp_path: Path) -> None:
    states = BaseHiddenStates(str(base), 3)
    kept = ReadBatches(tmp_path / "read", "base a")
    first = states.pooled_at(IDS, [1, 3], read=kept)
    assert kept.get(IDS, [1, 3], states.hidden_size) is None  # batches are of like lengths, so the order is another
    ordered = [IDS[1], IDS[0], IDS[2]]
    found = kept.get(ordered, [1, 3], states.hidden_size)
    assert found is not None
    assert torch.equal(found[3], first[3][[1, 0, 2]])
    again = states.pooled_at(IDS, [1, 3], read=kept)
    assert all(torch.equal(again[layer], first[layer]) for layer in (1, 3))
    assert kept.get(ordered, [1, 2], states.hidden_size) is None
    assert kept.get([*ordered[:2], [10] * 4], [1, 3], states.hidden_size) is None
    assert ReadBatches(kept.folder, "base b").get(ordered, [1, 3], states.hidden_size) is None


@pytest.mark.parametrize("damage", ["cut", "size", "nan"])
def test_a_damaged_file_is_read_again(base: Path, tmp_path: Path, damage: str) -> None:
    states = BaseHiddenStates(str(base), 1)
    kept = ReadBatches(tmp_path / "read", "base a")
    whole = states.pooled_at(IDS, [1], read=kept)
    [file] = kept.folder.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        odd = torch.zeros(2, states.hidden_size) if damage == "size" else torch.full((3, states.hidden_size), torch.nan)
        kept.put([IDS[1], IDS[0], IDS[2]], {1: odd})
    assert torch.equal(states.pooled_at(IDS, [1], read=kept)[1], whole[1])


def test_fisher_ratio_by_hand() -> None:
    """Centres at 0 and 4: variance 4 between; inside 1 and 3, so 2."""
    features = torch.tensor([[-1.0], [1.0], [4 - 3**0.5], [4 + 3**0.5]])
    assert fisher_ratio(features, torch.tensor([0, 0, 1, 1])) == pytest.approx(2.0)


def test_where_layers_err_alike_the_one_that_holds_domains_apart_is_taken() -> None:
    errors = {5: 0.0, 8: 0.0, 10: 0.004, 15: 0.1}
    assert best_layer(errors) == 5
    assert best_layer(errors, {5: 1.0, 8: 1.2, 10: 1.21, 15: 9.0}) == 8
    assert best_layer(errors, {5: 1.0, 8: 1.04, 10: 1.04, 15: 9.0}) == 5
