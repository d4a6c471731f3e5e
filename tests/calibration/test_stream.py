from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from meswitch_cli.calibration.stream import stream_statistics
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import DENSE_FAMILIES, make_pair

WINDOWS = torch.randint(4, 100, (7, 24), generator=torch.Generator().manual_seed(0))


def _streamed(path: Path) -> dict[str, InputStatistics]:
    weights = CheckpointWeights(Checkpoint.open(str(path)))
    found: dict[str, InputStatistics] = {}
    order: list[int] = []
    for index, statistics in stream_statistics(weights, WINDOWS, gram=True):
        order.append(index)
        found.update(statistics)
    assert order == list(range(weights.architecture.num_layers + 1))  # the layers, and the head
    return found


def _whole_model(path: Path) -> dict[str, torch.Tensor]:
    """Inputs of every linear, gathered from the whole model in one batch."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(f"{name}.weight", args[0].reshape(-1, args[0].shape[-1]))
            )
    with torch.no_grad():
        model(WINDOWS)
    return inputs


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_streaming_sees_what_the_whole_model_sees(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meswitch_cli.model.streaming.BATCH_TOKENS", 3 * 24)  # 7 windows in batches of 3, 3, 1
    _, expert = make_pair(tmp_path, family)
    streamed, expected = _streamed(expert), _whole_model(expert)
    assert set(streamed) == set(expected)
    for name, inputs in expected.items():
        assert streamed[name].tokens == WINDOWS.numel()
        torch.testing.assert_close(streamed[name].energy, inputs.square().sum(0), rtol=1e-3, atol=1e-4)
        gram = streamed[name].gram
        assert gram is not None
        torch.testing.assert_close(gram, inputs.T @ inputs, rtol=1e-3, atol=1e-3 * float(gram.abs().max()))


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    _, expert = make_pair(tmp_path, num_hidden_layers=6)
    weights = CheckpointWeights(Checkpoint.open(str(expert)))
    read: list[str] = []
    original = Checkpoint.read

    def spy(self: Checkpoint, name: str, *buffer: Any) -> torch.Tensor:
        read.append(name)
        return original(self, name, *buffer)

    seen: list[set[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", spy)
        for _ in stream_statistics(weights, WINDOWS):
            seen.append({name.split(".")[2] for name in read if ".layers." in name})
    assert seen[:6] == [{str(item) for item in range(index + 1)} for index in range(6)]  # no layer before its turn
    assert len(read) == len(set(read))  # and none twice
