"""Which device does the arithmetic."""

from __future__ import annotations

import re

import torch

from meswitch_cli.errors import UsageError


def choose_device(name: str) -> torch.device:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:N`; `cuda` is the current one, whose number the result has.

    Raises:
        UsageError: the name is none of these, or that device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name.partition(":")[2] or (torch.cuda.current_device() if found else 0))
    if index >= found:
        raise UsageError(f"--device {name}: {found} CUDA devices found")
    return torch.device("cuda", index)
