"""What another method is: its options, and what it makes of a delta."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_args, get_type_hints

import torch

from meswitch_cli.delta.codes import CODES
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.model.weights import Weights

#: Of one linear, where the method wants any.
Inputs = InputStatistics | None
Trained = Mapping[str, torch.Tensor]


class Approximation(NamedTuple):
    """A delta `[out, in]` as a method gives it back, and the bytes that it takes on disk.

    Bytes are counted exactly: packed codes by rows, 16-bit scales.
    """

    delta: torch.Tensor
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A method; its fields are the options that `--baseline` sets, a Literal's values all that are possible.

    Attributes:
        embedding: code width of embedding and head, 16 to keep them.
        seed: of what is random.

    Raises:
        ValueError: an option cannot have this value.
    """

    embedding: float = 2
    seed: int = 0

    #: What `embedding` may be.
    EMBEDDING_WIDTHS: ClassVar[tuple[float, ...]] = (*CODES, 16)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for key, value in self.options.items():
            allowed = self.EMBEDDING_WIDTHS if key == "embedding" else get_args(hints[key])
            if allowed and value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(map(str, allowed))}")
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"{key} cannot be {value}")
            if key == "bits" and not self.can_have_bits(value):
                raise ValueError("bits must lie between 0 and 8")

    def can_have_bits(self, bits: float) -> bool:
        """Whether an option `bits` may have this value."""
        return 0 < bits <= 8

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def needs_calibration(self) -> bool:
        """Whether `--calibration` must be given."""
        return False

    def generator(self, name: str) -> torch.Generator:
        """For what is random in the tensor of this name."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @abstractmethod
    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        """What the method makes of one linear's delta `[out, in]`, fp32; `name` only seeds what is random."""

    def vocabulary(self, kind: str, delta: torch.Tensor, statistics: Inputs = None) -> Approximation:
        """What becomes of the embedding's or the head's delta: by default what an artifact has at `embedding` bits."""
        return quantised(delta, QuantizerSettings(bits=self.embedding, salient=0))

    def statistics(self, activations: Activations) -> Mapping[str, InputStatistics]:
        """The input statistics that it wants, by parameter name."""
        return {}

    def train(self, start: Weights, expert: Weights, base: Weights, activations: Activations) -> Trained:
        """What training the whole model makes of linears' deltas `[out, in]`, by weight name; `start` is the model
        without it."""
        return {}


def quantised(delta: torch.Tensor, settings: QuantizerSettings, statistics: Inputs = None) -> Approximation:
    """A delta `[out, in]` as an artifact of these settings has it."""
    result = quantize(torch.zeros_like(delta), delta, settings, statistics)
    if result is None:
        return Approximation(torch.zeros_like(delta), 0)
    return Approximation(dequantize(result[0]), result[0].nbytes)


def packed_bytes(shape: torch.Size, bits: int) -> int:
    """Bytes of `[out, in]` codes, each row packed by itself to whole bytes."""
    out, width = shape
    return out * math.ceil(width * bits / 8)


def half(values: torch.Tensor) -> torch.Tensor:
    """Values as 16 bits hold them."""
    return values.half().float()
