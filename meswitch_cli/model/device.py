"""Which device does the arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

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


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of a CPU, what the operating system says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62  # an operating system that does not say
