"""What belongs to an expert beside its parameters comes back as it was, and costs nothing where it is the base's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.carried import CARRIED_TENSORS, Carried
from meswitch_cli.artifact.restore import restore
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.expert import refuse_other_computation
from meswitch_cli.errors import ArtifactError, CheckpointError
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import Pair
from zoo.tiny_tokenizer import tiny_tokenizer

#: Layers that predict further tokens: Qwen3.5's class does not load them, other engines do.
NAMES = ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2} | {
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 268, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip


def _model(folder: Path, family: str, **entries: object) -> Pair:
    """A random base of a family and an expert whose every parameter differs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **entries), dtype=torch.float32)
    for name in ("base", "expert"):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return folder / "base", folder / "expert"


def _add(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    file = folder / SINGLE_FILE
    safetensors.torch.save_file(safetensors.torch.load_file(file) | dict(tensors), file, {"format": "pt"})


def _compressed(base: Path, expert: Path, out: Path) -> Artifact:
    settings = CompressionSettings.with_defaults(salient=4)
    compress(prepare(str(base), str(expert), out, settings, None), keep_weak=True)
    return Artifact.open(out)


def _tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 6, generator=generator).bfloat16() for name in NAMES} | {
        "mtp.table": torch.tensor([3, 1, 2])
    }


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Base and expert of Qwen3.5 with further layers; the expert has changed one, and added one."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2} | {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    base, expert = _model(tmp_path_factory.mktemp("qwen"), "qwen3_5_text", **linear)
    _add(base, _tensors(1))
    _add(expert, _tensors(1) | {NAMES[0]: _tensors(2)[NAMES[0]], "mtp.own": torch.ones(3)})
    return base, expert


def test_further_layers_come_back_and_equal_ones_cost_nothing(qwen: Pair, tmp_path: Path) -> None:
    base, expert = qwen
    artifact = _compressed(base, expert, tmp_path / "a")
    assert set(Carried.of(artifact).own) == {NAMES[0], "mtp.own"}
    restore(artifact, Checkpoint.open(str(base)), tmp_path / "restored")
    whole, found = (safetensors.torch.load_file(path / SINGLE_FILE) for path in (expert, tmp_path / "restored"))
    for name in (name for name in whole if name.startswith("mtp.")):
        assert found[name].dtype == whole[name].dtype and torch.equal(found[name], whole[name])
    assert found.keys() == whole.keys() and not (tmp_path / "restored" / CARRIED_TENSORS).exists()
    again = _compressed(base, expert, tmp_path / "b")
    assert (again.path / CARRIED_TENSORS).read_bytes() == (artifact.path / CARRIED_TENSORS).read_bytes()


def test_an_expert_without_them_has_none(qwen: Pair, tmp_path: Path) -> None:
    base, expert = qwen
    plain = Path(shutil.copytree(expert, tmp_path / "plain"))
    tensors = safetensors.torch.load_file(plain / SINGLE_FILE)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    safetensors.torch.save_file(kept, plain / SINGLE_FILE, {"format": "pt"})
    artifact = _compressed(base, plain, tmp_path / "a")
    assert not (artifact.path / CARRIED_TENSORS).exists()
    restore(artifact, Checkpoint.open(str(base)), tmp_path / "restored")
    assert safetensors.torch.load_file(tmp_path / "restored" / SINGLE_FILE).keys() == kept.keys()


@pytest.mark.parametrize("how", ["lacks", "has with other values"])
def test_another_base_is_refused(qwen: Pair, tmp_path: Path, how: str) -> None:
    base, expert = qwen
    artifact = _compressed(base, expert, tmp_path / "a")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = safetensors.torch.load_file(other / SINGLE_FILE)
    del tensors[NAMES[1]]
    if how != "lacks":
        tensors[NAMES[1]] = _tensors(3)[NAMES[1]]
    safetensors.torch.save_file(tensors, other / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"{NAMES[1]}' is the base's, which .*other {how}"):
        restore(artifact, Checkpoint.open(str(other)), tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_buffer_with_values_of_its_own_is_the_experts(tmp_path: Path) -> None:
    base, expert = _model(tmp_path, "minimax", num_local_experts=2, num_experts_per_tok=1, block_size=8)
    stored = safetensors.torch.load_file(expert / SINGLE_FILE)
    name = next(name for name in stored if name.endswith("slope_rate"))
    own = stored[name] * 3
    assert Carried.of(_compressed(base, expert, tmp_path / "equal")).own == {}
    _add(expert, {name: own})
    artifact = _compressed(base, expert, tmp_path / "a")
    opened = Checkpoint.open(str(base))
    assert set(Carried.of(artifact).own) == {name}
    restore(artifact, opened, tmp_path / "restored")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "restored" / SINGLE_FILE)[name], own)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path / "restored", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert torch.equal(loaded.get_buffer(name), own)
    model = build_model(ArtifactWeights(artifact, CheckpointWeights(opened)), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(model.get_buffer(name), own)
    with pytest.raises(EngineError, match=rf"its buffer {name} has other values"):
        refuse_other_computation(artifact, opened)


def test_a_buffer_of_another_shape_is_refused(tmp_path: Path) -> None:
    base, _ = _model(tmp_path, "minimax", num_local_experts=2, num_experts_per_tok=1, block_size=8)
    name = next(name for name in safetensors.torch.load_file(base / SINGLE_FILE) if name.endswith("slope_rate"))
    _add(base, {name: torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"slope_rate' is \[3\], config.json says \[2, 1, 1\]"):
        Checkpoint.open(str(base))


def test_a_damaged_file_is_refused(qwen: Pair, tmp_path: Path) -> None:
    artifact = _compressed(*qwen, tmp_path / "a")
    safetensors.torch.save_file({}, artifact.path / CARRIED_TENSORS)
    opened = Checkpoint.open(str(qwen[0]))
    with pytest.raises(ArtifactError, match="carried"):
        restore(artifact, opened, tmp_path / "restored")
    with pytest.raises(ArtifactError, match="does not say what equals the base's"):
        dict(Carried(artifact.path / CARRIED_TENSORS).values(opened))
