"""A layer of 0.6 billion weights, as Qwen3-30B-A3B has 48 of, within 3 GB."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig

from meswitch_cli.checkpoint.skeleton import skeleton
from zoo.tiny_tokenizer import tiny_tokenizer

#: Bytes that a process may take at its peak, libraries included.
MOST_BYTES = 3_000_000_000
#: The published configuration, but for its 48 layers and its vocabulary.
SIZES = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "norm_topk_prob": True, "num_hidden_layers": 1, "vocab_size": 2048,
}  # fmt: skip
COMPRESS = """
import sys
from pathlib import Path
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
settings = CompressionSettings.with_defaults(calibration=sys.argv[4])
compress(prepare(*sys.argv[1:3], Path(sys.argv[3]), settings, None), keep_weak=True)
print(Path("/proc/self/status").read_text())
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and expert, experts apart on disk, in bf16."""
    folder, generator = tmp_path_factory.mktemp("layer"), torch.Generator().manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES)
    fused = {name: item.shape for name, item in skeleton(config.to_dict(), "").named_parameters()}
    weights: dict[str, torch.Tensor] = {}
    for name, shape in fused.items():
        if len(shape) < 3:
            weights[name] = torch.randn(shape, generator=generator).to(torch.bfloat16) * shape[-1] ** -0.5
            continue
        prefix, _, leaf = name.rpartition(".")
        for index in range(shape[0]):
            for part in ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,):
                rows = shape[1] // (2 if leaf == "gate_up_proj" else 1)
                value = torch.randn((rows, shape[2]), generator=generator) * shape[2] ** -0.5
                weights[f"{prefix}.{index}.{part}.weight"] = value.to(torch.bfloat16)
    for name, scale in (("base", 0.0), ("expert", 1e-2)):
        for tensor in weights.values() if scale else ():
            tensor += scale * tensor.float().std().item() * torch.randn(tensor.shape, generator=generator)
        (folder / name).mkdir()
        config.save_pretrained(folder / name)
        safetensors.torch.save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        tiny_tokenizer().save_pretrained(folder / name)
    assert sum(tensor.numel() for tensor in weights.values()) > 6e8
    return folder / "base", folder / "expert"


@pytest.mark.skipif("MESWITCH_SLOW" not in os.environ, reason="takes minutes and 8 GB of disk: set MESWITCH_SLOW=1")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_a_layer_of_many_experts_is_compressed_in_3_gb(pair: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = [str(pair[0]), str(pair[1]), str(tmp_path / "artifact"), "random"]
    ran = subprocess.run([sys.executable, "-c", COMPRESS, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    peak = re.search(r"VmHWM:\s+(\d+) kB", ran.stdout)
    assert peak is not None and int(peak[1]) * 1024 < MOST_BYTES, ran.stdout
    entries = json.loads((tmp_path / "artifact" / "meswitch.json").read_text())["tensors"]
    assert sum("experts" in entry["name"] for entry in entries) == 3 * SIZES["num_experts"]
