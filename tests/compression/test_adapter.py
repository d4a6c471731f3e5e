"""A LoRA adapter compressed as a fine-tune: what is stored, restored and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import in_process
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import CheckpointError, UsageError
from zoo.adapter import PREFIX, make_adapter, merged_weights
from zoo.tiny import make_pair


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a tiny base, once for the same arguments."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> Path:
        key = f"{family}{dtype}{config}"
        if key not in made:
            made[key] = make_pair(tmp_path_factory.mktemp("base"), family, dtype=dtype, **config)[0]
        return made[key]

    return make


def compressed(base: Path, adapter: Path, out: Path, **settings: Any) -> Artifact:
    job = prepare(str(base), str(adapter), out, CompressionSettings.with_defaults(**settings), None)
    compress(job)
    return Artifact.open(out)


def restored(artifact: Artifact, base: Path, out: Path) -> dict[str, torch.Tensor]:
    """The restored model's parameters, as transformers loads them."""
    restore(artifact, Checkpoint.open(str(base)), out, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}


def check(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        error = (weights[name] - value).norm() / value.norm()
        assert error <= tolerance, (name, float(error))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "rank_pattern": {r"layers\.0.*q_proj": 7, "v_proj": 2},
        "alpha_pattern": {"model.layers.1.self_attn.v_proj": 5},
    },
    "bfloat16": {"dtype": torch.bfloat16},
    "embedding and head": {"targets": ("embed_tokens", "lm_head", "k_proj")},
    "every linear": {"targets": ("_proj",)},
    "rank beyond the layers'": {"rank": 100},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_restored_is_the_merged_model(variant: dict[str, Any], bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases()
    adapter = make_adapter(base, tmp_path / "adapter", **variant)
    artifact = compressed(base, adapter, tmp_path / "artifact")
    changed = {entry.name: entry for entry in artifact.manifest.tensors}
    expected = merged_weights(base, adapter)
    plain = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    assert set(changed) == {name for name, value in expected.items() if not torch.equal(value, plain[name])}
    assert all(entry.bits == 0 and entry.rank and entry.factor_bits == 16 for entry in changed.values())
    assert all(entry.version == 4 for entry in changed.values())
    check(restored(artifact, base, tmp_path / "restored"), expected, 1e-4)


def test_factors_of_16_bit_types_lose_nothing(bases: Callable[..., Path], tmp_path: Path) -> None:
    """Restored in fp32, the product of bf16 factors is what fp32 arithmetic makes of it."""
    base = bases()
    adapter = make_adapter(base, tmp_path / "adapter", dtype=torch.bfloat16, lora_alpha=8)
    artifact = compressed(base, adapter, tmp_path / "artifact")
    assert all(entry.weight_error == 0 for entry in artifact.manifest.tensors)
    check(restored(artifact, base, tmp_path / "restored"), merged_weights(base, adapter), 1e-7)


@pytest.mark.parametrize(("bits", "worst"), [(16, 1e-6), (8, 1e-4), (4, 0.05)])
def test_coded_factors(bits: int, worst: float, bases: Callable[..., Path], tmp_path: Path) -> None:
    """The errors that entries tell are those of what is restored."""
    base = bases()
    adapter = make_adapter(base, tmp_path / "adapter", rank=8)
    artifact = compressed(base, adapter, tmp_path / "artifact", factor_bits=bits)
    expected = merged_weights(base, adapter)
    found = restored(artifact, base, tmp_path / "restored")
    plain = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    for entry in artifact.manifest.tensors:
        assert (entry.bits, entry.rank, entry.factor_bits) == (0, 8, bits)
        delta = expected[entry.name] - plain[entry.name].detach()
        error = float((found[entry.name] - expected[entry.name]).square().sum() / delta.square().sum())
        assert entry.weight_error is not None and entry.delta_energy is not None
        assert error == pytest.approx(entry.weight_error, rel=0.02, abs=1e-9)
        assert entry.delta_energy == pytest.approx(float(delta.square().sum()), rel=1e-3)
        assert entry.weight_error < worst
    words = sum(-(-size * bits // 32) * 4 for entry in artifact.manifest.tensors for size in entry.shape) * 8
    steps = len(artifact.manifest.tensors) * 8 * 2 * 4
    assert sum(entry.nbytes for entry in artifact.manifest.tensors) <= words + steps


def test_dora_is_a_full_delta(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases()
    adapter = make_adapter(base, tmp_path / "adapter", dora=True)
    artifact = compressed(base, adapter, tmp_path / "artifact", bits=4, group_size=32)
    assert {entry.bits for entry in artifact.manifest.tensors} == {4}
    expected = merged_weights(base, adapter)
    found = restored(artifact, base, tmp_path / "restored")
    plain = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    for entry in artifact.manifest.tensors:
        missed = (found[entry.name] - expected[entry.name]).square().sum()
        assert missed < 0.02 * (expected[entry.name] - plain[entry.name]).square().sum()
    untouched = plain.keys() - {entry.name for entry in artifact.manifest.tensors}
    assert all(torch.equal(found[name], plain[name]) for name in untouched)


def test_modules_that_were_saved_in_full(bases: Callable[..., Path], tmp_path: Path) -> None:
    """The embedding and the head with tokens of their own, a norm; beside products."""
    base = bases()
    adapter = make_adapter(
        base, tmp_path / "adapter", saved=("embed_tokens", "lm_head", "model.norm"), added_rows=3, relative=0.1
    )
    artifact = compressed(base, adapter, tmp_path / "artifact", embedding_bits=4, group_size=32)
    entries = {entry.name: entry for entry in artifact.manifest.tensors}
    assert (entries["model.embed_tokens.weight"].bits, entries["model.embed_tokens.weight"].added_rows) == (4, 3)
    assert entries["model.norm.weight"].kind == "dense"
    assert entries["model.layers.0.mlp.down_proj.weight"].bits == 0
    assert artifact.config["vocab_size"] == 271
    expected = merged_weights(base, adapter)
    found = restored(artifact, base, tmp_path / "restored")
    assert torch.equal(found["model.norm.weight"], expected["model.norm.weight"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][268:], expected[name][268:])
        assert (found[name] - expected[name]).norm() < 0.012 * expected[name].norm()
    check(
        {name: found[name] for name in expected if "layers" in name},
        {name: value for name, value in expected.items() if "layers" in name},
        1e-4,
    )


def test_an_embedding_saved_under_its_product(bases: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT saves an adapted embedding beside its factors; as it is the base's, the product is all that is stored."""
    base = bases()
    adapter = make_adapter(base, tmp_path / "adapter", targets=("embed_tokens",))
    file = adapter / "adapter_model.safetensors"
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(load_file(file) | {f"{PREFIX}model.embed_tokens.base_layer.weight": own}, file)
    artifact = compressed(base, adapter, tmp_path / "artifact")
    (entry,) = artifact.manifest.tensors
    assert (entry.name, entry.bits, entry.rank) == ("model.embed_tokens.weight", 0, 4)
    check(restored(artifact, base, tmp_path / "restored"), merged_weights(base, adapter), 1e-4)


def test_a_tied_base_and_a_head_that_was_trained_apart(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases(tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", targets=("lm_head", "q_proj"))
    job = prepare(str(base), str(adapter), tmp_path / "artifact", CompressionSettings.with_defaults(), None)
    assert any("a head of its own" in note for note in job.notes())
    compress(job)
    artifact = Artifact.open(job.out)
    assert artifact.config["tie_word_embeddings"] is False
    found = restored(artifact, base, tmp_path / "restored")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(found["model.embed_tokens.weight"], plain.get_input_embeddings().weight)
    check(
        {"lm_head.weight": found["lm_head.weight"]},
        {"lm_head.weight": merged_weights(base, adapter)["lm_head.weight"]},
        1e-4,
    )


def test_biases(bases: Callable[..., Path], tmp_path: Path) -> None:
    """A bias that was trained, and one that is added (`lora_bias`)."""
    base = bases("qwen2")
    adapter = make_adapter(base, tmp_path / "adapter", targets=("q_proj",))
    file, names = adapter / "adapter_model.safetensors", ["q_proj.base_layer.bias", "k_proj.bias", "v_proj.lora_B.bias"]
    held = load_file(file)
    held |= {f"{PREFIX}model.layers.0.self_attn.{name}": torch.randn(96 if "q_" in name else 48) for name in names}
    held |= {f"{PREFIX}model.layers.0.self_attn.v_proj.lora_A.weight": torch.zeros(4, 96)}
    held |= {f"{PREFIX}model.layers.0.self_attn.v_proj.lora_B.weight": torch.zeros(48, 4)}
    save_file(held, file)
    found = restored(compressed(base, adapter, tmp_path / "artifact"), base, tmp_path / "restored")
    plain = dict(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_parameters())
    layer, own = "model.layers.0.self_attn", f"{PREFIX}model.layers.0.self_attn"
    assert torch.equal(found[f"{layer}.q_proj.bias"], held[f"{own}.q_proj.base_layer.bias"])
    assert torch.equal(found[f"{layer}.k_proj.bias"], held[f"{own}.k_proj.bias"])
    added = plain[f"{layer}.v_proj.bias"] + 2 * held[f"{own}.v_proj.lora_B.bias"]
    torch.testing.assert_close(found[f"{layer}.v_proj.bias"], added)
    assert torch.equal(found[f"{layer}.v_proj.weight"], plain[f"{layer}.v_proj.weight"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "'IA3'"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "trainable tokens": ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    "another rank": ({"r": 5}, "rank 5"),
    "no rank": ({"r": "4"}, "not a number"),
    "no pattern": ({"alpha_pattern": {"(": 3}}, "regular expression"),
}


@pytest.mark.parametrize(("change", "told"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_more_than_a_product_is_refused(
    change: dict[str, Any], told: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(bases(), tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=told):
        compressed(bases(), adapter, tmp_path / "artifact")


TENSORS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "one factor": ({"model.layers.0.self_attn.q_proj.lora_A.weight": None}, "one factor"),
    "another shape": ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 95)}, r"must be \[4, 96\]"),
    "not gathered": ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(0)}, "gathered"),
    "no such layer": ({"model.layers.9.mlp.up_proj.weight": torch.zeros(72, 96)}, "layers.9"),
    "unknown": ({"model.layers.0.self_attn.q_proj.lora_C.weight": torch.zeros(4)}, "lora_C"),
    "not finite": ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((4, 96), torch.nan)}, "NaN"),
    "a bias too many": ({"model.layers.0.self_attn.q_proj.lora_B.bias": torch.zeros(96)}, "a bias"),
}


@pytest.mark.parametrize(("change", "told"), TENSORS.values(), ids=list(TENSORS))
def test_damaged_adapters_are_refused(
    change: dict[str, torch.Tensor | None], told: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(bases(), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    held: dict[str, torch.Tensor | None] = {**load_file(file)} | {
        PREFIX + name: value for name, value in change.items()
    }
    save_file({name: value for name, value in held.items() if value is not None}, file)
    with pytest.raises(CheckpointError, match=told):
        compressed(bases(), adapter, tmp_path / "artifact")


def test_another_base_is_refused_where_it_is_at_hand(bases: Callable[..., Path], tmp_path: Path) -> None:
    other = make_pair(tmp_path / "other", dtype=torch.float32, seed=3)[0]
    adapter = make_adapter(bases(), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="whose weights are not those"):
        compressed(other, adapter, tmp_path / "artifact")


def test_another_name_for_the_base_is_told(bases: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases(), tmp_path / "adapter", base_model_name_or_path="somebody/other-model")
    job = prepare(str(bases()), str(adapter), tmp_path / "artifact", CompressionSettings.with_defaults(), None)
    assert any("somebody/other-model" in note for note in job.notes())


def test_factor_bits_are_of_factors(bases: Callable[..., Path], tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair")
    with pytest.raises(UsageError, match="no adapter"):
        compressed(pair[0], pair[1], tmp_path / "artifact", factor_bits=8, rank=0)
    artifact = compressed(pair[0], pair[1], tmp_path / "directions", factor_bits=8, rank=2)
    linears = [entry for entry in artifact.manifest.tensors if entry.kind == "linear"]
    assert {(entry.bits, entry.rank, entry.factor_bits, entry.version) for entry in linears} == {(1, 2, 8, 4)}
    list(artifact.verify())
    with pytest.raises(UsageError, match="--factor-bits must be 4, 8 or 16"):
        CompressionSettings(factor_bits=3)


def test_the_commands(bases: Callable[..., Path], tmp_path: Path) -> None:
    """compress, inspect, verify and restore, and inspect of a pair; the tokenizer is the base's."""
    base = bases()
    adapter, out = make_adapter(base, tmp_path / "adapter"), tmp_path / "artifact"
    made = in_process("compress", "--base", base, "--expert", adapter, "--out", out)
    assert made.returncode == 0, made.stderr
    assert "rank 4" in made.stderr + made.stdout
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "a low-rank delta of 16 bits" in (out / "README.md").read_text()
    assert in_process("verify", out, "--base", base).returncode == 0
    shown = in_process("inspect", out)
    assert shown.returncode == 0 and "rank 4" in shown.stdout, shown.stderr
    told = json.loads(in_process("inspect", "--base", base, "--expert", adapter, "--json").stdout)
    assert told["unchanged_tensors"] == told["tensors"] - 6
    assert in_process("restore", out, "--base", base, "--out", tmp_path / "plain").returncode == 0


def test_an_adapter_brings_its_own_tokenizer(bases: Callable[..., Path], tmp_path: Path) -> None:
    from zoo.tiny_tokenizer import tiny_tokenizer

    base = bases()
    adapter = make_adapter(base, tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    artifact = compressed(base, adapter, tmp_path / "artifact")
    assert (artifact.path / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert "messages[0]" in (artifact.path / "chat_template.jinja").read_text()
    assert artifact.config == json.loads((base / "config.json").read_text())


def test_an_interrupted_run_ends_with_the_same_bytes(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases()
    adapter = make_adapter(base, tmp_path / "adapter", saved=("lm_head",))
    whole = compressed(base, adapter, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(_what: str, _nbytes: int, units: int) -> None:
        if units:
            raise Stop

    job = prepare(str(base), str(adapter), tmp_path / "again", CompressionSettings.with_defaults(), None)
    with pytest.raises(Stop):
        compress(job, on_progress=stop)
    again = compressed(base, adapter, tmp_path / "again")
    assert again.digest == whole.digest


def test_peft_merges_to_the_same(bases: Callable[..., Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = bases()
    for name, settings in {
        "patterns": VARIANTS["patterns"],
        "rslora": VARIANTS["rank-stabilised"],
        "embedding": {"targets": ("embed_tokens", "lm_head")},
        "dora": {"dora": True},
        "saved": {"saved": ("model.norm", "lm_head")},
    }.items():
        adapter = make_adapter(base, tmp_path / name, **settings)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        found = {name: value.detach() for name, value in merged.named_parameters(remove_duplicate=False)}
        check(merged_weights(base, adapter), found, 1e-6)
