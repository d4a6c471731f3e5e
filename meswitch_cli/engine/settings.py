"""What an engine is told before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from meswitch_cli.errors import UsageError
from meswitch_cli.model.device import available_bytes, choose_device
from meswitch_cli.model.dtype import DTYPES
from meswitch_cli.names import check_name


@dataclass(frozen=True)
class EngineSettings:
    """A base, its experts, and how much of the machine they may take.

    Attributes:
        base: folder or Hub id.
        experts: artifact folders by the name under which each is served.
        slots: experts on the device at once; None is one for each of `experts`.
        device: as in `choose_device`.
        dtype: `auto` is the checkpoint's own; float32 for a float16 checkpoint on a CPU, which has no kernels for it.
        max_model_len: prompt and continuation together, in tokens; None is the model's, at most 8192.
        max_queue: requests that may wait beyond the `max_running` that generate.
        max_running: requests in one batch.
        max_batch_tokens: tokens of one forward pass, prompts included.
        cache_tokens: tokens whose keys and values the cache holds; None chooses by device and model.
        page_size: tokens of a cache block, the unit of sharing; None is 32, and 64 on a GPU, whose attention reads as
            many at once.
        prefix_sharing: whether requests of one expert share the cache of equal beginnings.
        max_wait: seconds that a request may wait for a slot before its expert is given one that others still use.
        host_bytes: host memory for copies of experts that are not on the device; None is 0 on a CPU, else half of
            what is available at the start: it is pinned, so nobody else gets it back.
        tensor_parallel, pipeline_parallel: devices that share each layer, and devices that share the layers out; more
            than one with vLLM alone.
        data_parallel: copies of base and experts, on devices of their own; more than one with vLLM alone.
        seed: of requests that bring none.
        strict: whether one artifact that cannot be served stops the start.
    """

    base: str
    experts: Mapping[str, Path] = field(default_factory=dict)
    slots: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_queue: int = 256
    max_running: int = 32
    max_batch_tokens: int = 1024
    cache_tokens: int | None = None
    page_size: int | None = None
    prefix_sharing: bool = True
    max_wait: float = 2.0
    host_bytes: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    seed: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Check every member.

        Raises:
            UsageError: a value is impossible.
        """
        for name in self.experts:
            check_name(name)
        least = {"slots": 1, "max_model_len": 2, "max_queue": 0, "max_running": 1, "max_batch_tokens": 16}
        least |= {"tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 1}
        least |= {"cache_tokens": 1, "page_size": 4, "max_wait": 0, "host_bytes": 0}
        for option, minimum in least.items():
            value = getattr(self, option)
            if value is not None and value < minimum:
                raise UsageError(f"{option}: {value} is too small; at least {minimum}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UsageError(f"dtype: {self.dtype!r} is none of auto, {', '.join(DTYPES)}")
        device = self.torch_device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # The engine's threads launch kernels on the current device.
            raise UsageError(
                f"--device {self.device}: an engine computes on the first CUDA device that it sees; show it this one "
                f"alone, with CUDA_VISIBLE_DEVICES={device.index}"
            )

    @property
    def torch_device(self) -> torch.device:
        return choose_device(self.device)

    @property
    def copies_nbytes(self) -> int:
        """`host_bytes`, decided."""
        return copies_nbytes(self.torch_device) if self.host_bytes is None else self.host_bytes


def copies_nbytes(device: torch.device, workers: int = 1) -> int:
    """Host memory for copies of experts in each of `workers` processes, where nobody says how much.

    On a CPU a copy would be the same memory twice.
    """
    return 0 if device.type == "cpu" else available_bytes(torch.device("cpu")) // 2 // workers
