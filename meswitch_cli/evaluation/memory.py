"""Whether a model fits into memory."""

from __future__ import annotations

from pathlib import Path

import torch

from meswitch_cli.model.weights import Weights, parameter_count


def resident_bytes(weights: Weights, dtype: torch.dtype) -> int:
    """Bytes of the weights in memory."""
    return parameter_count(weights) * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of a CPU, what the operating system says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62  # an operating system that does not say: the user chooses --mode
