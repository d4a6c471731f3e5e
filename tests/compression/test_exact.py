"""Experts that are stored bit for bit: restored with their own fingerprint, and coded when they are served."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import in_process

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.tensorfile import read_header
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import ArtifactError, UsageError
from meswitch_cli.model.weights import CheckpointWeights
from zoo.adapter import make_adapter
from zoo.tiny import Pair, make_pair


def exactly(pair: Pair, out: Path) -> Artifact:
    job = prepare(str(pair[0]), str(pair[1]), out, CompressionSettings.with_defaults(exact=True), None)
    compress(job)
    return Artifact.open(out)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def sparse_pair(folder: Path, share: float = 0.05, **options: Any) -> Pair:
    """A fine-tune that moves a share of all weights by one rounding step."""
    base, expert = make_pair(folder, **options)
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, tensor in tensors_of(base).items():
        up = torch.rand(tensor.shape, generator=generator) < share
        moved[name] = torch.where(up, tensor.view(torch.int16) + 1, tensor.view(torch.int16)).view(tensor.dtype)
    for file in expert.glob("*.safetensors"):
        file.unlink()
    safetensors.torch.save_file(moved, expert / "model.safetensors", metadata={"format": "pt"})
    return base, expert


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True, "added_rows": 3},
        {"dtype": torch.float32},
        {"dtype": torch.float16, "family": "gpt_neox"},
        {"dtype": torch.bfloat16, "expert_dtype": torch.float32},
        {"dtype": torch.float32, "expert_dtype": torch.bfloat16, "added_rows": 2},
        {"family": "gemma3", "equal": ("model.layers.0.mlp.up_proj.weight",)},
        {"max_shard_size": "20KB"},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_restored_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", **options)
    artifact = exactly(pair, tmp_path / "artifact")
    expert = Checkpoint.open(str(pair[1]))
    restored = restore(artifact, Checkpoint.open(str(pair[0])), tmp_path / "restored")
    assert CheckpointWeights(Checkpoint.open(str(restored))).fingerprint == CheckpointWeights(expert).fingerprint
    assert artifact.manifest.expert.fingerprint == CheckpointWeights(expert).fingerprint
    own, found = tensors_of(pair[1]), tensors_of(restored)
    assert own.keys() == found.keys()
    for name, tensor in own.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_types_that_differ_within_a_model_stay(tmp_path: Path) -> None:
    """A norm in fp32 among bf16 weights, the base's and the expert's own."""
    base, expert = sparse_pair(tmp_path / "pair")
    for folder, wide in ((base, "model.norm.weight"), (expert, "model.layers.0.input_layernorm.weight")):
        file = folder / "model.safetensors"
        held = tensors_of(folder)
        safetensors.torch.save_file(held | {wide: held[wide].float()}, file, metadata={"format": "pt"})
    artifact = exactly((base, expert), tmp_path / "artifact")
    restored = restore(artifact, Checkpoint.open(str(base)), tmp_path / "restored")
    types = {name: tensor.dtype for name, tensor in tensors_of(restored).items()}
    assert types == {name: tensor.dtype for name, tensor in tensors_of(expert).items()}
    assert set(types.values()) == {torch.bfloat16, torch.float32}


def test_a_sparse_update_takes_less_than_its_code(tmp_path: Path) -> None:
    pair = sparse_pair(tmp_path / "pair", share=0.03, hidden_size=256, intermediate_size=512, vocab_size=300)
    artifact = exactly(pair, tmp_path / "artifact")
    coded = tmp_path / "coded"
    compress(prepare(str(pair[0]), str(pair[1]), coded, CompressionSettings(bits=2), None), keep_weak=True)
    assert artifact.manifest.nbytes < 0.25 * Artifact.open(coded).manifest.nbytes
    assert all(entry.exact == entry.nbytes and entry.version == 4 for entry in artifact.manifest.tensors)


def test_restoring_proves_the_expert(tmp_path: Path) -> None:
    """An artifact whose manifest names another expert is refused, its own hashes being right."""
    pair = sparse_pair(tmp_path / "pair")
    artifact = exactly(pair, tmp_path / "artifact")
    file = artifact.path / "meswitch.json"
    file.write_text(file.read_text().replace(artifact.manifest.expert.fingerprint, "sha256:" + "0" * 64))
    base = Checkpoint.open(str(pair[0]))
    with pytest.raises(ArtifactError, match="its expert"):
        restore(Artifact.open(artifact.path), base, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    restore(Artifact.open(artifact.path), base, tmp_path / "wide", dtype=torch.float32)  # no longer bit for bit


def test_an_expert_that_is_its_base(tmp_path: Path, pair: Pair) -> None:
    artifact = exactly((pair[0], pair[0]), tmp_path / "artifact")
    assert not artifact.manifest.tensors
    restored = restore(artifact, Checkpoint.open(str(pair[0])), tmp_path / "restored")
    assert tensors_of(restored).keys() == tensors_of(pair[0]).keys()


def test_adapters_are_refused(tmp_path: Path, pair: Pair) -> None:
    adapter = make_adapter(pair[0], tmp_path / "adapter")
    with pytest.raises(UsageError, match="--exact"):
        exactly((pair[0], adapter), tmp_path / "artifact")


def test_the_commands(tmp_path: Path) -> None:
    base, expert = sparse_pair(tmp_path / "pair", share=0.02)
    out = tmp_path / "artifact"
    told = in_process("inspect", "--base", base, "--expert", expert)
    assert "--exact" in told.stdout, told.stderr
    figures = json.loads(in_process("inspect", "--base", base, "--expert", expert, "--json").stdout)
    made = in_process("compress", "--base", base, "--expert", expert, "--out", out, "--exact")
    assert made.returncode == 0, made.stderr
    assert "bit for bit if changed" in made.stderr and "expected size" not in made.stderr
    assert in_process("verify", out, "--base", base).returncode == 0
    linears = [entry for entry in Artifact.open(out).manifest.tensors if entry.kind == "linear"]
    header = 66 * len(linears)  # which weighs more than the streams of weights so small
    bits = 8 * sum(entry.nbytes for entry in linears) / sum(entry.numel for entry in linears)
    assert figures["exact_bits"] == pytest.approx(bits, rel=0.25)
    assert header < sum(entry.nbytes for entry in linears)
    shown = in_process("inspect", out)
    assert "bit for bit" in shown.stdout


def test_damage_is_found(tmp_path: Path) -> None:
    """A stream that does not unpack, in a shard whose hash and manifest agree with it."""
    pair = sparse_pair(tmp_path / "pair")
    artifact = exactly(pair, tmp_path / "artifact")
    shard = artifact.manifest.shards[0]
    file = artifact.path / shard.name
    info = next(iter(read_header(file).values()))
    data = bytearray(file.read_bytes())
    data[info.offset + info.nbytes - 10 : info.offset + info.nbytes] = bytes(10)
    file.write_bytes(data)
    manifest = artifact.path / "meswitch.json"
    manifest.write_text(manifest.read_text().replace(shard.sha256, hashlib.sha256(data).hexdigest()))
    with pytest.raises(ArtifactError, match=info.name.removesuffix(".exact")):
        for _ in Artifact.open(artifact.path).verify():
            pass
