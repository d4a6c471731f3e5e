"""What a model's class makes of stored tensors: ties, buffers that follow from the config, names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from meswitch_cli.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from meswitch_cli.checkpoint.config import config_differences
from meswitch_cli.checkpoint.tensorfile import equal_tensors, read_header
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.architecture import architecture
from meswitch_cli.model.build import build_model
from meswitch_cli.model.matching import make_plan
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import Pair, make_pair

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _change(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    file = folder / SINGLE_FILE
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "model"))


def _fingerprint(folder: Path) -> str:
    checkpoint = Checkpoint.open(str(folder))
    return CheckpointWeights(checkpoint).fingerprint


def _stored(folder: Path) -> dict[str, str]:
    checkpoint = Checkpoint.open(str(folder))
    stored = architecture(checkpoint.config, str(folder)).stored(checkpoint)
    return {name: storage.name for name, storage in stored.items()}


# Ties.


def test_a_stored_head_that_differs_is_kept_whatever_the_config_says(folder: Path) -> None:
    _change(folder, lambda tensors: tensors, tie_word_embeddings=True)
    checkpoint = Checkpoint.open(str(folder))
    assert architecture(checkpoint.config, "").parameters[HEAD].tied_to is None
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(checkpoint.read(HEAD), loaded.lm_head.weight.detach())
    assert HEAD in checkpoint.notes[0] and "tie_word_embeddings" in checkpoint.notes[0]


def test_such_a_head_is_in_the_fingerprint(folder: Path) -> None:
    untied = _fingerprint(folder)
    assert _fingerprint(_change(folder, lambda tensors: tensors, tie_word_embeddings=True)) == untied
    other = _change(folder, lambda tensors: tensors | {HEAD: -tensors[HEAD]})
    assert _fingerprint(other) != untied


def test_a_stored_copy_of_the_embedding_stays_tied(tmp_path: Path) -> None:
    tied, _ = make_pair(tmp_path, tie_word_embeddings=True)
    before = _fingerprint(tied)
    _change(tied, lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    assert architecture(Checkpoint.open(str(tied)).config, "").parameters[HEAD].tied_to == EMBEDDING
    assert _fingerprint(tied) == before and Checkpoint.open(str(tied)).notes == ()


def test_one_tensor_under_the_heads_name_is_both(tmp_path: Path) -> None:
    tied, _ = make_pair(tmp_path, tie_word_embeddings=True)
    before = _fingerprint(tied)
    _change(tied, lambda tensors: {HEAD if name == EMBEDDING else name: item for name, item in tensors.items()})
    loaded = AutoModelForCausalLM.from_pretrained(tied)
    assert torch.equal(Checkpoint.open(str(tied)).read(_stored(tied)[EMBEDDING]), loaded.model.embed_tokens.weight)
    assert _fingerprint(tied) == before


def test_a_family_that_ties_by_default_is_asked_too(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "gemma", tie_word_embeddings=False)
    path = base / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tie_word_embeddings"}))
    assert architecture(json.loads(path.read_text()), "").parameters[HEAD].tied_to == EMBEDDING
    assert architecture(Checkpoint.open(str(base)).config, "").parameters[HEAD].tied_to is None


def test_tensors_are_compared_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meswitch_cli.checkpoint.tensorfile.COMPARED_ELEMENTS", 7)
    first = torch.arange(40.0).reshape(4, 10)
    late = first.clone()
    late[3, 9] += 1
    safetensors.torch.save_file(
        {"a": first, "same": first.bfloat16(), "late": late, "flat": first.flatten().clone()}, tmp_path / "x"
    )
    infos = read_header(tmp_path / "x")
    assert equal_tensors(infos["a"], infos["same"])
    assert not equal_tensors(infos["a"], infos["late"])
    assert not equal_tensors(infos["a"], infos["flat"])


# Buffers.

_DERIVED = {
    "model.rotary_emb.inv_freq": torch.ones(12),
    "model.rotary_emb.original_inv_freq": torch.ones(12),
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12),
    "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 16, 24),
    "model.layers.0.self_attn.rotary.inv_freq": torch.ones(12),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril(),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
    "model.position_ids": torch.arange(16)[None],
}


@pytest.mark.parametrize("name", _DERIVED)
def test_a_buffer_that_follows_from_the_config_is_left_out(folder: Path, name: str) -> None:
    before = _fingerprint(folder)
    _change(folder, lambda tensors: tensors | {name: _DERIVED[name]})
    assert name not in Checkpoint.open(str(folder)).tensors
    assert _fingerprint(folder) == before and Checkpoint.open(str(folder)).notes == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.self_attn.k_scale", torch.ones(1)),
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(24)),
        ("model.layers.0.mlp.act_fn.alpha", torch.ones(1)),
        ("model.some_ids", torch.tensor([3, 1, 2])),
        ("empty", torch.zeros(0, 4)),
    ],
)
def test_what_does_not_follow_from_it_is_refused(folder: Path, name: str, value: Tensor) -> None:
    _change(folder, lambda tensors: tensors | {name: value})
    with pytest.raises(CheckpointError, match=r"not part of llama, the first is|weights must be bf16"):
        _stored(folder)


def test_what_a_familys_class_leaves_out_is_no_part_of_it_and_named(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "gpt_neox")
    before, name = _fingerprint(base), "gpt_neox.layers.0.attention.bias"
    _change(base, lambda tensors: tensors | {name: torch.ones(3)})
    checkpoint = Checkpoint.open(str(base))
    assert repr(name) in checkpoint.notes[0]
    assert name not in checkpoint.tensors and list(checkpoint.extras) == [name] and not checkpoint.buffers
    assert _fingerprint(base) == before


def test_saved_buffers_are_the_models_with_the_values_that_they_have(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("apertus", **sizes, num_key_value_heads=1, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.act_fn.beta"
    assert _stored(tmp_path)[name] == name  # transformers gives one that is missing no value at all
    before = _fingerprint(tmp_path)
    _change(tmp_path, lambda tensors: tensors | {name: tensors[name] * 3})
    assert _fingerprint(tmp_path) != before
    weights = CheckpointWeights(Checkpoint.open(str(tmp_path)))
    assert build_model(weights, torch.device("cpu"), torch.bfloat16).get_buffer(name) == 1.5


# Names.


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda name: f"_orig_mod.{name}", r"'_orig_mod' \(torch.compile\)"),
        (lambda name: f"module.{name}", r"'module' \(a parallel wrapper\)"),
        (lambda name: f"base_model.model.{name}", r"'base_model' \(PEFT\)"),
        (lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."), r"'_fsdp_wrapped_module' \(FSDP\)"),
        (lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."), "activation checkpointing"),
        (lambda name: f"language_model.{name}", r"the prefix 'language_model\.'"),
        (lambda name: f"a.b.{name}", r"the prefix 'a\.b\.'"),
        (lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"), "before its adapter is merged"),
    ],
    ids=["compile", "ddp", "peft", "fsdp", "checkpointing", "language_model", "any", "base_layer"],
)
def test_a_wrapper_in_the_names_is_called_by_its_name(folder: Path, rename: Callable[[str], str], named: str) -> None:
    _change(folder, lambda tensors: {rename(name): item for name, item in tensors.items()})
    with pytest.raises(CheckpointError, match=named) as caught:
        _stored(folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_inside_the_weights_is_called_one(folder: Path) -> None:
    lora = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    _change(folder, lambda tensors: tensors | {lora: torch.zeros(4, 96)})
    with pytest.raises(CheckpointError, match="a LoRA adapter that was never merged"):
        _stored(folder)


@pytest.mark.parametrize("rename", [lambda name: f"model.{name}", lambda name: name.removeprefix("model.")])
def test_a_prefix_that_transformers_takes_off_or_puts_on_is_none(folder: Path, rename: Callable[[str], str]) -> None:
    before = _fingerprint(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    _change(folder, lambda tensors: {rename(name): item for name, item in tensors.items()})
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert _fingerprint(folder) == before


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    _change(folder, lambda tensors: tensors | {"norm.weight": tensors["model.norm.weight"] * 2})
    with pytest.raises(CheckpointError, match=r"holds 'model\.norm\.weight' twice"):
        Checkpoint.open(str(folder))


# The config.


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_an_attention_kernel_that_is_not_installed_does_not_matter(folder: Path, key: str) -> None:
    before = _fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    _change(folder, lambda tensors: tensors, **{key: "flash_attention_2"})
    assert _fingerprint(folder) == before
    assert config_differences(config, Checkpoint.open(str(folder)).config) == {}


def test_two_spellings_of_one_rope_are_no_difference(pair: Pair) -> None:
    new = json.loads((pair[0] / "config.json").read_text())
    rope = new["rope_parameters"]
    plain = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old = plain | {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert config_differences(new, old) == {}
    assert set(config_differences(new, old | {"rope_theta": 5e5})) == {"rope_parameters"}
    longer = old | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert "rope_parameters" in config_differences(new, longer)


def test_a_plan_of_a_wrong_expert_says_what_was_odd_about_its_folder(folder: Path, pair: Pair) -> None:
    (folder / "model.fp16.safetensors").write_bytes(b"")
    _change(folder, lambda tensors: {name: item for name, item in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"missing, the first is 'model\.norm\.weight'.*fp16\.safetensors is not"):
        make_plan(Checkpoint.open(str(pair[0])), Checkpoint.open(str(folder)))


def test_a_class_that_ties_nothing_keeps_its_head_whatever_the_config_says(tmp_path: Path) -> None:
    sizes = {
        "d_model": 32,
        "decoder_layers": 1,
        "encoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
    }
    config = AutoConfig.for_model("bigbird_pegasus", **sizes, vocab_size=64, max_position_embeddings=64)
    config.is_decoder, config.tie_word_embeddings = True, True
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert architecture(Checkpoint.open(str(tmp_path)).config, "").parameters[HEAD].tied_to is None
    assert HEAD in _stored(tmp_path)
