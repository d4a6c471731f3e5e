"""What a card can do: by its data sheet, and as it was measured, which `tuning.json` holds."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources


@dataclass(frozen=True)
class DataSheet:
    """A vendor's figures: bytes a second of the memory, multiply-adds counted twice a second of dense bfloat16."""

    memory: float
    matrix: float


#: By the names that CUDA gives the cards.
DATA_SHEETS: Mapping[str, DataSheet] = {
    "NVIDIA H200": DataSheet(4.8e12, 989e12),
    "NVIDIA H100 80GB HBM3": DataSheet(3.35e12, 989e12),
    "NVIDIA H100 PCIe": DataSheet(2.0e12, 756e12),
    "NVIDIA A100-SXM4-80GB": DataSheet(2.039e12, 312e12),
    "NVIDIA A100-SXM4-40GB": DataSheet(1.555e12, 312e12),
    "NVIDIA L40S": DataSheet(0.864e12, 362e12),
    "NVIDIA A10": DataSheet(0.6e12, 125e12),
    "NVIDIA GeForce RTX 4090": DataSheet(1.008e12, 165e12),
}


@dataclass(frozen=True)
class CardConstants:
    """What `kernels/benchmarks/card_constants.py` makes of a proof run on a card. Bytes and operations are per second.

    Attributes:
        commit: of the run.
        copy: bytes of a copy, those read and those written.
        base: bytes at which a decode step reads the base.
        experts: bytes at which it reads its experts' deltas, by the bits of their linears.
        layer_seconds: of a decoder layer, whatever it reads: attention, norms, launches.
        step_seconds: of a step, whatever its layers: sampling, and what the host does between steps.
        prompt_operations: multiply-adds, counted twice, at which prompts are read.
        load: bytes at which an expert comes from host memory into its slot; None where that was not measured.
    """

    commit: str
    copy: float
    base: float
    experts: Mapping[str, float]
    layer_seconds: float
    step_seconds: float
    prompt_operations: float
    load: float | None


@functools.cache
def measured_cards() -> dict[str, CardConstants]:
    """The cards of which `tuning.json` holds constants."""
    text = resources.files(__package__).joinpath("tuning.json").read_text()
    return {name: card_constants(held) for name, held in json.loads(text).get("constants", {}).items()}


def card_constants(held: Mapping[str, object]) -> CardConstants:
    """Constants as `tuning.json` holds them. Raises KeyError where one is missing."""
    return CardConstants(**{field.name: held[field.name] for field in fields(CardConstants)})  # type: ignore[arg-type]
