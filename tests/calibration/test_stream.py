from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from meswitch_cli.calibration.stream import stream_statistics
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import CalibrationError
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import DENSE_FAMILIES, Pair, make_pair

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


def test_a_family_that_adds_a_position_table_in_fp32_runs_in_bf16(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 48, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("xglm", **sizes), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = CheckpointWeights(Checkpoint.open(str(tmp_path)))
    found: dict[str, InputStatistics] = {}
    for _, own in stream_statistics(weights, WINDOWS, dtype=torch.bfloat16):
        found |= own
    expected = _whole_model(tmp_path)["model.layers.1.fc1.weight"].square().sum(0)
    torch.testing.assert_close(found["model.layers.1.fc1.weight"].energy, expected, rtol=0.1, atol=0.1)


def test_a_head_that_does_not_read_the_last_hidden_state_has_no_statistics(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "rembert", **sizes, vocab_size=128, input_embedding_size=16, output_embedding_size=24, is_decoder=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert not any(name.startswith("cls.predictions.decoder") for name in _streamed(tmp_path))


def test_a_family_whose_layers_do_not_run_alone_is_one_line(pair: Pair) -> None:
    weights = CheckpointWeights(Checkpoint.open(str(pair[0])))
    with pytest.raises(CalibrationError, match=r"llama: its layers cannot be run one by one: .*--calibration none"):
        list(stream_statistics(weights, WINDOWS + 10_000))
