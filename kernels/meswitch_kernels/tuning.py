"""Launch settings of the Triton kernels: measured ones from `tuning.json`, else a default by shape."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from .groups import tile_size_for

MERGE_TOKENS = 96
"""`merge_tokens` of a card that nobody has measured. It is reckoned: six tiles of decode read codes for about as long
as a merge takes."""


@dataclass(frozen=True)
class LaunchSettings:
    """Block shape, pipelining and split of a launch of decode.

    `splits` share the input channels of the base's weights; `delta_splits` share those of the codes, and
    `delta_programs` the tiles of tokens, as long as there are as many tiles in use.
    """

    block_out: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    delta_splits: int = 1
    delta_programs: int = 16


@dataclass(frozen=True)
class Card:
    """What settings depend on of a card."""

    name: str
    processors: int
    hopper: bool


def token_bucket(tokens: int) -> int:
    """`tokens` rounded up to a power of two from 16 to 64: what a kernel is compiled and tuned for."""
    return next((size for size in (16, 32, 64) if tokens <= size), 64)


def launch_settings(
    out_features: int,
    in_features: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    grouped: bool = False,
) -> LaunchSettings:
    """Decode's settings at a shape, measured on this card where they are known."""
    card = card_of(device)
    table = _measured().get(card.name, {})
    found = table.get(settings_key(out_features, in_features, tokens))
    if found and not grouped:
        return LaunchSettings(**found)
    return default_settings(out_features, in_features, tokens, card, dtype == torch.float32, grouped)


def settings_key(out_features: int, in_features: int, tokens: int) -> str:
    """Where `tuning.json` has decode's settings at a shape."""
    return f"decode/{out_features}x{in_features}/{tile_size_for(tokens)}/{token_bucket(tokens)}"


def default_settings(
    out_features: int,
    in_features: int,
    tokens: int,
    card: Card,
    wide: bool = False,
    grouped: bool = False,
) -> LaunchSettings:
    """Settings that no measurement has chosen: large blocks that compile without a spill.

    docs/results/kernels-compile.md has the registers of each. The input channels are split until there are about two
    programs per processor. `wide` is for float32 operands, `grouped` for
    groups of steps: both take more registers.
    """
    wide = wide or grouped
    block_out, block_k, splits, delta_splits = 32 if wide else 64, 32 if wide else 64, 1, 1
    blocks = -(-out_features // block_out)
    while blocks * splits < 2 * card.processors and in_features >= 8 * block_k * splits:
        splits *= 2
    while 1.1 * blocks * delta_splits < card.processors and in_features >= 2048 * delta_splits:
        delta_splits *= 2
    # Programs without a tile leave at once, but cost a start; those of many tiles pass them on to one another.
    programs = max(1, 16 * card.processors // (blocks * delta_splits))
    warps, stages = (4, 2) if wide else (2, 3)
    if tokens > 32 and not card.hopper:
        warps = 4  # two would spill there
    return LaunchSettings(block_out, block_k, splits, warps, stages, delta_splits, programs)


def merge_tokens(device: torch.device) -> int:
    """Tokens of one slot from which its weights are merged for cuBLAS: measured on this card, where they were."""
    return int(_content().get("merge_tokens", {}).get(card_of(device).name, MERGE_TOKENS))


@functools.cache
def card_of(device: torch.device) -> Card:
    """The card behind a device; a stand-in where Triton only interprets its kernels."""
    if device.type != "cuda":
        return Card("none", 4, hopper=True)
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.name, properties.multi_processor_count, properties.major >= 9)


def _measured() -> dict[str, dict[str, dict[str, int]]]:
    table: dict[str, dict[str, dict[str, int]]] = _content()["cards"]
    return table


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(resources.files(__package__).joinpath("tuning.json").read_text())
    return content
