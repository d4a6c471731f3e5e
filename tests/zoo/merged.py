"""A random LoRA merged into a base, as a checkpoint: what most people have of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

#: What a name has in it of a linear of the decoder's layers, in any family.
LINEARS = ("_proj", "mlp.", "attn.", "experts.", "block_sparse_moe.")


def merge_lora(
    base: Path,
    folder: Path,
    *,
    rank: int = 4,
    targets: Sequence[str] = LINEARS,
    relative: float = 0.05,
    dtype: torch.dtype | None = None,
    rest: float = 0.0,
    seed: int = 0,
) -> Path:
    """Write the base with a product of `rank` added to every matrix whose name has one of `targets` in it.

    Products are `relative` times the matrix's norm, added in fp32, and rounded to `dtype`, None: the base's. Of a stack
    each matrix has its own. `rest`, over the product's energy, is that of a random matrix which is added too.
    """
    generator = torch.Generator().manual_seed(seed)
    merged = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            value = weight.float()
            if weight.dim() >= 2 and any(target in name for target in targets):
                matrices = value.view(-1, *value.shape[-2:])
                for matrix in matrices:
                    left = torch.randn(matrix.shape[0], rank, generator=generator)
                    product = left @ torch.randn(rank, matrix.shape[1], generator=generator)
                    product *= relative * matrix.norm() / product.norm()
                    noise = torch.randn(matrix.shape, generator=generator)
                    noise *= rest**0.5 * product.norm() / noise.norm()
                    matrix += product + noise
            merged[name] = value.to(dtype or weight.dtype)
    folder.mkdir(parents=True)
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder
