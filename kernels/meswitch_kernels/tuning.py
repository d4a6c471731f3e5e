"""Launch settings of the Triton kernels: measured ones from `tuning.json`, else a default by shape."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

import torch


@dataclass(frozen=True)
class LaunchSettings:
    """Block shape, pipelining and split of one kernel launch."""

    block_out: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def token_bucket(tokens: int) -> int:
    """`tokens` rounded up to a power of two from 16 to 64: what a kernel is compiled and tuned for."""
    return next((size for size in (16, 32, 64) if tokens <= size), 64)


def launch_settings(
    kernel: str, out_features: int, in_features: int, tokens: int, device: torch.device
) -> LaunchSettings:
    """Settings for `kernel` ("decode" or "prefill") at a shape, measured on this card where they are known."""
    name, processors = _card(device)
    table = _measured().get(name, {})
    found = table.get(f"{kernel}/{out_features}x{in_features}/{token_bucket(tokens)}")
    if found:
        return LaunchSettings(**found)
    return default_settings(kernel, out_features, in_features, processors)


@functools.cache
def default_settings(kernel: str, out_features: int, in_features: int, processors: int) -> LaunchSettings:
    """Settings that no measurement has chosen yet: enough programs to fill the card about twice."""
    if kernel == "prefill":
        return LaunchSettings(block_out=128, block_k=64, splits=1, num_warps=8, num_stages=3)
    block_out, block_k, splits = 64, 128, 1
    while -(-out_features // block_out) * splits < 2 * processors and in_features >= 4 * block_k * splits:
        splits *= 2
    return LaunchSettings(block_out, block_k, splits, num_warps=4, num_stages=3)


@functools.cache
def _measured() -> dict[str, dict[str, dict[str, int]]]:
    text = resources.files(__package__).joinpath("tuning.json").read_text()
    table: dict[str, dict[str, dict[str, int]]] = json.loads(text)["cards"]
    return table


@functools.cache
def _card(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return "none", 4
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
