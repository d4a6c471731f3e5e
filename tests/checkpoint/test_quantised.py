"""Checkpoints that are stored in few bits: what they are read as, and what is made of fine-tunes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import in_process
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import CheckpointError, MeswitchError
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import make_pair

Tensors = dict[str, torch.Tensor]
#: Makes of a weight's name and value the tensors that are stored and what they stand for, fp32.
Quantiser = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]


def fp8_blocks(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Blocks of 32 x 64, the last of a row and of a column cut short."""
    rows, columns = (-(-size // block) for size, block in zip(weight.shape, (32, 64), strict=True))
    codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    value = torch.empty_like(weight)
    for i in range(rows):
        for j in range(columns):
            place = slice(32 * i, 32 * i + 32), slice(64 * j, 64 * j + 64)
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            value[place] = codes[place].float() * scales[i, j]
    return {name: codes, f"{name}_scale_inv": scales}, value


def fp8_rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale


def int8_rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale.float()


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers of rows, one after the other, in 32-bit words."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * index) for index, code in enumerate(row))
        words = [whole >> (32 * index) & 0xFFFFFFFF for index in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def int4_groups(name: str, weight: torch.Tensor, *, zeros: bool = False) -> tuple[Tensors, torch.Tensor]:
    """Groups of 8 channels (all widths here are multiples), symmetric or with a zero of their own."""
    grouped = weight.view(weight.shape[0], -1, 8)
    stem = name.removesuffix(".weight")
    if zeros:
        low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
        scale = (high - low) / 15
        zero = (-8 - low / scale).round().clamp(-8, 7)
    else:
        scale, zero = grouped.abs().amax(2, keepdim=True) / 7, torch.zeros_like(grouped[..., :1])
    codes = (grouped / scale + zero).round().clamp(-8, 7)
    value = ((codes - zero) * scale).view(weight.shape)
    stored = {
        f"{stem}.weight_packed": packed((codes + 8).long().view(weight.shape), 4),
        f"{stem}.weight_scale": scale[..., 0],
        f"{stem}.weight_shape": torch.tensor(weight.shape),
    }
    if zeros:
        stored[f"{stem}.weight_zero_point"] = packed((zero[..., 0] + 8).long().T, 4).T.contiguous()
    return stored, value


def mxfp4_groups(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([values, -values])
    grouped = weight.view(weight.shape[0], -1, 32)
    exponent = torch.floor(torch.log2(grouped.abs().amax(2, keepdim=True))) - 2
    codes = (grouped.unsqueeze(-1) / torch.exp2(exponent).unsqueeze(-1) - table).abs().argmin(-1)
    value = (table[codes] * torch.exp2(exponent)).view(weight.shape)
    flat = codes.view(weight.shape)
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.weight_packed": (flat[:, ::2] | flat[:, 1::2] << 4).to(torch.uint8),
        f"{stem}.weight_scale": (exponent[..., 0] + 127).to(torch.uint8),
    }, value


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


METHODS: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 64], "activation_scheme": "dynamic"}),
    "fp8 by row": (fp8_rows, compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "int8": (int8_rows, compressed("int-quantized", num_bits=8, type="int", strategy="channel")),
    "int4": (int4_groups, compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8)),
    "int4 with zeros": (
        lambda name, weight: int4_groups(name, weight, zeros=True),
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8, symmetric=False),
    ),
    "mxfp4": (mxfp4_groups, compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32)),
}


def quantise(folder: Path, out: Path, method: str) -> Tensors:
    """Store a model's linears quantised; returns what its weights stand for, in bf16."""
    quantiser, config = METHODS[method]
    shutil.copytree(folder, out)
    stored: Tensors = {}
    meant: Tensors = {}
    for name, weight in safetensors.torch.load_file(folder / "model.safetensors").items():
        if "_proj" in name and name.endswith(".weight"):
            tensors, value = quantiser(name, weight.float())
            stored |= tensors | {f"{name.removesuffix('weight')}input_scale": torch.tensor(1.0)}
            meant[name] = value.to(torch.bfloat16)
        else:
            stored[name] = meant[name] = weight
    safetensors.torch.save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return meant


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("plain"), intermediate_size=128)


@pytest.mark.parametrize("method", METHODS)
def test_read_as_what_it_stands_for(method: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    meant = quantise(plain[0], tmp_path / "base", method)
    checkpoint = Checkpoint.open(str(tmp_path / "base"))
    weights = CheckpointWeights(checkpoint)
    assert weights.stored.keys() == meant.keys()
    for name, value in meant.items():
        assert torch.equal(weights.read(name), value), name
    assert any("stored quantised" in note for note in checkpoint.notes)


def test_the_fingerprint_is_of_what_is_stored(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """A scale and a code that go together otherwise mean the same weight, and are another model."""
    quantise(plain[0], tmp_path / "base", "int8")
    first = CheckpointWeights(Checkpoint.open(str(tmp_path / "base"))).fingerprint
    file = tmp_path / "base" / "model.safetensors"
    held = safetensors.torch.load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    held[name] = (held[name] // 2 * 2).contiguous()
    safetensors.torch.save_file(held, file, metadata={"format": "pt"})
    even = CheckpointWeights(Checkpoint.open(str(tmp_path / "base"))).fingerprint
    held[name], held[f"{name}_scale"] = (held[name] // 2).contiguous(), held[f"{name}_scale"] * 2
    safetensors.torch.save_file(held, file, metadata={"format": "pt"})
    halved = CheckpointWeights(Checkpoint.open(str(tmp_path / "base"))).fingerprint
    assert len({first, even, halved}) == 3


@pytest.mark.parametrize("method", ["fp8", "int4 with zeros", "mxfp4"])
def test_a_fine_tune_of_a_quantised_base(method: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Compressed, verified, restored: to what the base stands for, plus the delta."""
    base, expert, out = tmp_path / "base", tmp_path / "expert", tmp_path / "artifact"
    meant = quantise(plain[0], base, method)
    shutil.copytree(plain[0], expert)
    generator = torch.Generator().manual_seed(0)
    tuned = {
        name: (value.float() + 0.01 * value.float().std() * torch.randn(value.shape, generator=generator)).bfloat16()
        for name, value in meant.items()
    }
    safetensors.torch.save_file(tuned, expert / "model.safetensors", metadata={"format": "pt"})
    made = in_process("compress", "--base", base, "--expert", expert, "--out", out, "--exact")
    assert made.returncode == 0, made.stderr
    assert in_process("verify", out, "--base", base).returncode == 0
    assert in_process("verify", out, "--base", plain[0]).returncode == 1
    restored = restore(Artifact.open(out), Checkpoint.open(str(base)), tmp_path / "restored")
    assert "quantization_config" not in json.loads((restored / "config.json").read_text())
    found = safetensors.torch.load_file(restored / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tuned.items())
    AutoModelForCausalLM.from_pretrained(restored)


def test_a_quantised_expert(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Both stored in FP8: the delta is of what they stand for."""
    meant = quantise(plain[0], tmp_path / "base", "fp8")
    tuned = quantise(plain[1], tmp_path / "expert", "fp8")
    settings = CompressionSettings.with_defaults(bits=4, group_size=32, calibration=None)
    job = prepare(str(tmp_path / "base"), str(tmp_path / "expert"), tmp_path / "artifact", settings, None)
    compress(job, keep_weak=True)
    restored = restore(Artifact.open(job.out), Checkpoint.open(str(tmp_path / "base")), tmp_path / "restored")
    found = safetensors.torch.load_file(restored / "model.safetensors")
    for name, value in tuned.items():
        if "_proj" in name:
            delta = (value.float() - meant[name].float()).norm()
            assert (found[name].float() - value.float()).norm() < 0.35 * delta
    assert "quantization_config" not in json.loads((restored / "config.json").read_text())
    with pytest.raises(MeswitchError, match="--exact"):
        prepare(str(tmp_path / "base"), str(tmp_path / "expert"), job.out, CompressionSettings(exact=True), None)


def test_mxfp4_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Stacked matrices, each read by itself, as transformers' own reading has them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, _ = make_pair(tmp_path / "pair", "gpt_oss", intermediate_size=64)
    held = safetensors.torch.load_file(folder / "model.safetensors")
    generator, meant = torch.Generator().manual_seed(0), {}
    for name in [name for name in held if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inside, outside = held.pop(name).shape
        blocks = torch.randint(0, 256, (count, outside, inside // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(115, 125, (count, outside, inside // 32), generator=generator, dtype=torch.uint8)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales)
    safetensors.torch.save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    weights = CheckpointWeights(Checkpoint.open(str(folder)))
    seen = 0
    for name, storage in weights.stored.items():
        whole = meant.get(storage.name)
        if whole is not None:
            piece = storage.parameter.piece
            assert piece is not None
            assert piece.index is not None
            value = storage.parameter.to_stored(weights.read(name))
            assert torch.equal(value, whole[piece.index]), name
            seen += 1
    assert seen == sum(len(whole) for whole in meant.values())


DAMAGE: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "no scale": (
        "int8",
        lambda held: held.__delitem__("model.layers.0.mlp.up_proj.weight_scale"),
        "without its scale",
    ),
    "another scale": (
        "int8",
        lambda held: held.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(3, 1)}),
        "do not go together",
    ),
    "another block": (
        "fp8",
        lambda held: held.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 2)}),
        "do not go together",
    ),
    "another shape": (
        "int4",
        lambda held: held.update({"model.layers.0.mlp.up_proj.weight_shape": torch.tensor([128, 4000])}),
        "do not go together",
    ),
}


@pytest.mark.parametrize(("method", "change", "told"), DAMAGE.values(), ids=list(DAMAGE))
def test_damage_is_refused(
    method: str, change: Callable[[Tensors], None], told: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    quantise(plain[0], tmp_path / "base", method)
    file = tmp_path / "base" / "model.safetensors"
    held = safetensors.torch.load_file(file)
    change(held)
    safetensors.torch.save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=told):
        _ = CheckpointWeights(Checkpoint.open(str(tmp_path / "base"))).fingerprint


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"quant_method": "awq"}, "awq"),
        ("fp8", "fp8"),
        (compressed("nvfp4-pack-quantized"), "nvfp4"),
        (compressed("pack-quantized", num_bits=4, actorder="group"), "reordered"),
        ({"quant_method": "compressed-tensors"}, "no groups"),
    ],
)
def test_other_methods_are_refused(config: Any, told: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(plain[0], tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=told):
        Checkpoint.open(str(tmp_path / "base"))


def test_compressed_tensors_unpacks_to_the_same() -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(0)
    for bits in (3, 4, 8):
        codes = torch.randint(0, 1 << bits, (5, 37), generator=generator)
        signed = library.unpack_from_int32(packed(codes, bits), bits, torch.Size((5, 37)))
        assert torch.equal(signed.long() + (1 << (bits - 1)), codes)
