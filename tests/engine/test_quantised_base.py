"""A base that is stored in FP8, served as what it stands for, with a full fine-tune and an adapter of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from engine.family import EXPERTS, Family, compress_experts, make_family, requests

from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import TransformersEngine, generate
from zoo.adapter import make_adapter


def store_in_fp8(folder: Path, out: Path) -> None:
    """One scale for each block of 32 x 32."""
    shutil.copytree(folder, out)
    held = safetensors.torch.load_file(folder / "model.safetensors")
    for name in [name for name in held if "_proj" in name]:
        weight = held[name].float()
        rows, columns = (-(-size // 32) for size in weight.shape)
        padded = torch.nn.functional.pad(weight, (0, 32 * columns - weight.shape[1], 0, 32 * rows - weight.shape[0]))
        blocks = padded.view(rows, 32, columns, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
        held[name], held[f"{name}_scale_inv"] = codes.to(torch.float8_e4m3fn).contiguous(), scale
    safetensors.torch.save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    file = out / "config.json"
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))


def meant_by(folder: Path, out: Path) -> None:
    """The model that a folder of FP8 stands for, as an ordinary one."""
    shutil.copytree(folder, out)
    held = safetensors.torch.load_file(folder / "model.safetensors")
    for name in [name for name in held if name.endswith("_scale_inv")]:
        codes, scale = held[name.removesuffix("_scale_inv")].float(), held.pop(name)
        spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: codes.shape[0], : codes.shape[1]]
        held[name.removesuffix("_scale_inv")] = (codes * spread).to(torch.bfloat16)
    safetensors.torch.save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))


def test_tokens_are_those_of_what_it_stands_for(tmp_path: Path, start: Callable[..., TransformersEngine]) -> None:
    plain = make_family(tmp_path / "plain", experts={}, dtype=torch.bfloat16).base
    quantised, meant = tmp_path / "quantised", tmp_path / "meant"
    store_in_fp8(plain, quantised)
    meant_by(quantised, meant)
    reference = compress_experts(meant, tmp_path / "reference", torch.float32, experts={"alpha": EXPERTS["alpha"]})
    adapter = make_adapter(meant, tmp_path / "adapter")
    for base, out in ((meant, tmp_path / "reference" / "lora"), (quantised, tmp_path / "lora")):
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps(json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None})
        )
        compress(prepare(str(base), str(adapter), out, CompressionSettings.with_defaults(), None))
    expert = tmp_path / "reference" / "alpha-full"
    settings = CompressionSettings(samples=4, sequence_length=32, embedding_bits=2, **EXPERTS["alpha"].settings)
    compress(prepare(str(quantised), str(expert), tmp_path / "alpha", settings, None))
    names = {"alpha": tmp_path / "alpha", "lora": tmp_path / "lora"}
    expected = Family(meant, {**reference.artifacts, "lora": tmp_path / "reference" / "lora"}, torch.float32)
    engine = start(Family(quantised, names, torch.float32), dtype="float32")
    batch = requests(expected, 12, seed=1)
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.error is None
        assert completion.tokens == expected.greedy(request), request.expert
