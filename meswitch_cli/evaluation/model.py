"""A model in memory from any source of weights, and how many bytes that takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from meswitch_cli.calibration.stream import materialise_buffers, set_parameter
from meswitch_cli.checkpoint.architecture import skeleton
from meswitch_cli.errors import CalibrationError, EvaluationError
from meswitch_cli.evaluation.weights import Weights, parameter_count


def build_model(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """Build the transformers model with these weights, in evaluation mode.

    Raises:
        EvaluationError: a buffer of this family does not follow from its config.
    """
    model: Any = skeleton(weights.config, weights.name)
    try:
        materialise_buffers(model, device)  # before the weights: it initialises the modules that it visits
    except CalibrationError as error:
        raise EvaluationError(f"{weights.name}: {error}") from error
    for name, item in weights.architecture.parameters.items():
        if item.tied_to is None:
            set_parameter(model, name, weights.read(name).to(device=device, dtype=dtype))
    model.tie_weights()
    return model.eval()


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
