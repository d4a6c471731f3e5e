"""One grammar of devices, for compress, eval and serve."""

import pytest
import torch

from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.errors import UsageError
from meswitch_cli.model.device import choose_device


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_with_two_cards(two_cards: None, name: str, index: int) -> None:
    assert choose_device(name) == torch.device("cuda", index)
    assert choose_device("cpu") == torch.device("cpu")


def test_without_a_card(no_card: None) -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=f"--device {name}: 0 CUDA devices found"):
            choose_device(name)


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", ""])
def test_what_is_no_device(two_cards: None, name: str) -> None:
    for choose in (choose_device, lambda name: EngineSettings(base="x", device=name)):
        with pytest.raises(UsageError, match="--device must be auto, cpu, cuda or cuda:N"):
            choose(name)


def test_a_card_too_many(two_cards: None) -> None:
    for choose in (choose_device, lambda name: EngineSettings(base="x", device=name)):
        with pytest.raises(UsageError, match="--device cuda:2: 2 CUDA devices found"):
            choose("cuda:2")


def test_an_engine_says_how_to_reach_the_other_card(two_cards: None) -> None:
    assert EngineSettings(base="x", device="cuda:0").torch_device == torch.device("cuda", 0)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=1"):
        EngineSettings(base="x", device="cuda:1")
