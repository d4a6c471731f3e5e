"""The dtype that a checkpoint's weights are in, and the one that a model shall have."""

from __future__ import annotations

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json and our options spell it."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's bytes are in; what its config says where it has no weights.

    Bytes and not numbers of weights: where half of a model is wider, the wider dtype is the one that loses nothing. It
    is what artifacts record, too.

    Raises:
        UsageError: there are no weights and the config does not say.
    """
    if not checkpoint.tensors:
        told = str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))).removeprefix("torch.")
        if told not in DTYPES:
            raise UsageError(f"{checkpoint.source.path}: has no weights and no dtype in its config.json: give --dtype")
        return DTYPES[told]
    totals: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
    return max(totals, key=lambda dtype: totals[dtype])


def model_dtype(checkpoint: Checkpoint, asked: str) -> torch.dtype:
    """The dtype asked for by name; `auto` is `stored_dtype`.

    Raises:
        UsageError: as `stored_dtype`.
    """
    return stored_dtype(checkpoint) if asked == "auto" else DTYPES[asked]
