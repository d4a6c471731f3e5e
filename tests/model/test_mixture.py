"""Mixtures of experts: one 3-D parameter in memory, matrices of single experts on disk and in artifacts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.calibration.stream import EXPERT_TOKENS, stream_statistics
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression import job as compression_job
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.compression.windows import random_windows
from meswitch_cli.delta.quantize import dequantize
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.proof import prove
from meswitch_cli.model.architecture import architecture
from meswitch_cli.model.build import build_model
from meswitch_cli.model.stack import MatrixStack
from meswitch_cli.model.streaming import StreamedModel
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import Pair, make_pair
from zoo.tiny_tokenizer import tiny_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(4, 84).reshape(2, 40)
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]
#: A matrix of each as its checkpoint has it, by the family; gpt-oss keeps all experts in one tensor.
GATE_OF_TWO = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.2.gate_proj.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj.2",
}


@pytest.fixture(scope="module", params=MIXTURES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def mixture(family: str, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp(family), family, dtype=torch.float32)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("qwen"), "qwen3_moe", dtype=torch.float32)


def _weights(path: Path) -> CheckpointWeights:
    return CheckpointWeights(Checkpoint.open(str(path)))


def _file(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_a_built_and_a_streamed_model_are_transformers_own(mixture: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, weights = _plain(mixture[1])(IDS).logits, _weights(mixture[1])
    assert torch.equal(build_model(weights, CPU, torch.float32)(IDS).logits, plain)

    def refuse(_stack: MatrixStack) -> Tensor:
        raise AssertionError("all experts of a layer at once")

    monkeypatch.setattr(MatrixStack, "whole", refuse)
    torch.testing.assert_close(StreamedModel(weights, CPU, torch.float32).logits(IDS), plain, rtol=1e-5, atol=1e-5)


def test_an_expert_comes_back_under_the_names_of_its_own_file(mixture: Pair, family: str, tmp_path: Path) -> None:
    settings = CompressionSettings(salient=4, calibration=None)
    compress(prepare(str(mixture[0]), str(mixture[1]), tmp_path / "a", settings, None))
    artifact, base = Artifact.open(tmp_path / "a"), _weights(mixture[0])
    assert len(list(artifact.verify())) == len(artifact.manifest.shards) + len(artifact.manifest.files)
    entry = next(entry for entry in artifact.manifest.tensors if entry.name == GATE_OF_TWO[family])
    assert entry.kind == "linear" and entry.bits == 2 and entry.weight_error is not None and entry.weight_error < 0.2
    restore(artifact, base.checkpoint, tmp_path / "back")
    back, own = _file(tmp_path / "back"), _file(mixture[1])
    assert {name: item.shape for name, item in back.items()} == {name: item.shape for name, item in own.items()}
    expected = base.read(entry.name) + dequantize(artifact.shard(entry.shard).delta(entry.name))
    if family == "gpt_oss":
        assert torch.equal(back[entry.name.removesuffix(".2")][2], expected.T)
    else:
        assert torch.equal(back[entry.name], expected)
    with torch.no_grad():
        ours = build_model(ArtifactWeights(artifact, base), CPU, torch.float32)(IDS).logits
        assert torch.equal(ours, _plain(tmp_path / "back")(IDS).logits)


def test_an_expert_of_the_mixture_that_did_not_change_costs_nothing(mixture: Pair, family: str, tmp_path: Path) -> None:
    base, changed = _file(mixture[0]), _file(mixture[1])
    kept = [name for name in changed if ".experts.1." in name or (family == "gpt_oss" and ".experts." in name)]
    for name in kept:
        if ".experts.1." in name:
            changed[name] = base[name].clone()
        else:
            changed[name][1] = base[name][1]
    _copy(mixture[1], tmp_path / "expert", changed)
    settings = CompressionSettings(salient=4, calibration=None)
    compress(prepare(str(mixture[0]), str(tmp_path / "expert"), tmp_path / "a", settings, None))
    manifest = Artifact.open(tmp_path / "a").manifest
    unchanged = {name for name in kept if "bias" not in name}
    if family == "gpt_oss":
        unchanged = {f"{name}.1" for name in unchanged if "bias" not in name}
    assert set(manifest.unchanged) == unchanged and len(unchanged) == (4 if family == "gpt_oss" else 6)


def _copy(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_that_holds_experts_fused_is_the_same_model(family: str, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, family, dtype=torch.float32)
    fused = {name: item.contiguous() for name, item in _plain(base).state_dict().items()}
    assert fused["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    _copy(base, tmp_path / "fused", fused)
    one, other = _weights(base), _weights(tmp_path / "fused")
    assert other.fingerprint == one.fingerprint
    name = GATE_OF_TWO[family]
    assert torch.equal(one.read(name), other.read(name)) and torch.equal(one.read(name), _file(base)[name])


def _inputs_of_experts(model: Any, layer: int) -> dict[str, Tensor]:
    """What reaches the matrices of each expert of a layer with SiLU, computed by hand from what the router chose."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[layer].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model(IDS)
    hook.remove()
    (hidden, chosen), found = seen[0], {}
    for index in range(len(experts.down_proj)):
        own = hidden[(chosen == index).any(1)]
        gate, up = (own @ experts.gate_up_proj[index].T).chunk(2, dim=1)
        found[f"{index}.gate"], found[f"{index}.down"] = own, nn.functional.silu(gate) * up
    return found


@pytest.mark.parametrize("gram", [False, True])
def test_each_expert_is_calibrated_on_the_tokens_that_reach_it(qwen: Pair, gram: bool) -> None:
    expected = _inputs_of_experts(_plain(qwen[1]), 1)
    found = dict(stream_statistics(_weights(qwen[1]), IDS, gram=gram, experts_gram=False))[1]
    for index in range(4):
        for part, key in (("gate_proj", "gate"), ("up_proj", "gate"), ("down_proj", "down")):
            statistics, own = found[f"model.layers.1.mlp.experts.{index}.{part}.weight"], expected[f"{index}.{key}"]
            assert statistics.tokens == len(own) < EXPERT_TOKENS
            torch.testing.assert_close(statistics.energy, own.square().sum(0), rtol=1e-3, atol=1e-5)
            assert statistics.gram is None
            if gram:  # a matrix for every expert would be larger than the layer: the inputs stand for it
                assert statistics.inputs is not None
                found_gram = statistics.inputs.T @ statistics.inputs
                torch.testing.assert_close(found_gram, own.T @ own, rtol=1e-3, atol=1e-2)


def test_who_too_few_tokens_reach_is_counted_and_compressed_without(
    qwen: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs(name: str) -> tuple[list[str], int]:
        notes: list[str] = []
        settings = CompressionSettings.with_defaults(salient=4)
        compress(prepare(str(qwen[0]), str(qwen[1]), tmp_path / name, settings, None), on_note=notes.append)
        entries = Artifact.open(tmp_path / name).manifest.tensors
        return notes, sum(entry.output_error is not None for entry in entries if ".experts." in entry.name)

    assert outputs("enough") == ([], 24)
    monkeypatch.setattr(compression_job, "LEAST_TOKENS", 1000)
    notes, measured = outputs("few")
    assert measured == 0 and len(notes) == 1
    assert "fewer than 1000 calibration tokens reach 24 of 24 matrices of experts" in notes[0]


@pytest.mark.parametrize(
    ("family", "sizes", "windows"),
    [("llama", {}, 1), ("mixtral", {}, 4), ("qwen3_moe", {"num_experts": 128}, 16), ("deepseek_v3", {}, 32)],
)
def test_random_tokens_are_as_many_as_give_each_expert_a_window(
    family: str, sizes: dict[str, int], windows: int
) -> None:
    config = AutoConfig.for_model(family, **sizes, num_hidden_layers=4).to_dict()
    assert random_windows(architecture(config, family), config) == windows


def test_the_bias_that_balances_experts_keeps_its_values_and_its_type(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=96, intermediate_size=72, moe_intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, vocab_size=268,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    name, steps = "model.layers.1.mlp.gate.e_score_correction_bias", torch.arange(8) * 1e-3
    for folder in ("base", "expert"):
        tensors = {key: item.detach().clone() for key, item in model.state_dict().items()}
        tensors[name] = (1 + steps).float() + (folder == "expert") * 1e-5
        model.save_pretrained(tmp_path / folder, state_dict=tensors)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    settings = CompressionSettings(salient=4, calibration=None)
    compress(prepare(str(tmp_path / "base"), str(tmp_path / "expert"), tmp_path / "a", settings, None))
    artifact = Artifact.open(tmp_path / "a")
    assert [entry.name for entry in artifact.manifest.tensors] == [name]
    restore(artifact, Checkpoint.open(str(tmp_path / "base")), tmp_path / "back")
    back, own = _file(tmp_path / "back"), _file(tmp_path / "expert")
    assert own[name].dtype == torch.float32 and _same(back, own)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(loaded.get_buffer(name), own[name])


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == item.dtype and torch.equal(one[name], item) for name, item in other.items()
    )


def test_the_embedded_engine_serves_a_mixture_or_refuses_it_by_name(mixture: Pair, family: str) -> None:
    config = Checkpoint.open(str(mixture[0])).config
    where = r"keeps model\.layers\.0\.(mlp\.experts|mlp\.router|self_attn\.sinks)"
    refused = pytest.raises(EngineError, match=f"{family} {where}")
    with refused if family == "gpt_oss" else contextlib.nullcontext():
        prove(config, "base", CPU, torch.float32)
