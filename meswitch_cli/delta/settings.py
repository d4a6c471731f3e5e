"""How one delta is quantised: a frozen, validated set of choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meswitch_cli.delta.codes import CODES, LISTED

ChannelScale = Literal["none", "rms"]
Rounding = Literal["nearest", "feedback"]
StepRule = Literal["least-squares", "unbiased", "output-unbiased", "layerwise"]

MAX_SALIENT = 4096
MAX_RANK = 1024


@dataclass(frozen=True)
class QuantizerSettings:
    """Settings of `quantize`.

    Attributes:
        bits: width of the codes, one of `CODES`.
        salient: input channels a tensor keeps in 16 bit.
        group_size: input channels that share a step, a multiple of 32; 0 is one step per output channel.
        channel_scale: `rms` scales each input channel by the root mean square of the delta's column.
        rounding: `nearest`, or `feedback` of each column's error to the columns not yet rounded (GPTQ).
        steps: `least-squares` fits the delta, `unbiased` keeps its projection on itself, `output-unbiased` keeps that
            of its outputs on calibration inputs, `layerwise` fits the outputs.
        rank: leading directions of a tensor that are kept beside the codes.

    Raises:
        ValueError: a value is outside what is listed here.
    """

    bits: int = 2
    salient: int = 8
    group_size: int = 0
    channel_scale: ChannelScale = "none"
    rounding: Rounding = "nearest"
    steps: StepRule = "unbiased"
    rank: int = 0

    def __post_init__(self) -> None:
        if self.bits not in CODES:
            raise ValueError(f"bits must be {LISTED}, not {self.bits}")
        if not 0 <= self.salient <= MAX_SALIENT:
            raise ValueError(f"salient must lie between 0 and {MAX_SALIENT}, not {self.salient}")
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank must lie between 0 and {MAX_RANK}, not {self.rank}")
        multiple = CODES[self.bits].group_multiple
        if self.group_size < 0 or self.group_size % multiple:
            raise ValueError(f"group size must be 0 or a multiple of {multiple}, not {self.group_size}")
        for name, allowed in (("channel_scale", ChannelScale), ("rounding", Rounding), ("steps", StepRule)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}")

    @property
    def needs_gram(self) -> bool:
        """Whether the inputs' second moments H = X^T X are needed, not only their energies."""
        return self.rounding == "feedback" or self.steps == "layerwise"
