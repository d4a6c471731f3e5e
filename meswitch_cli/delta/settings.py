"""How one delta is quantised: a frozen, validated set of choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from meswitch_cli.delta.codes import Code, CodeName, TrellisCode, find_code, listed
from meswitch_cli.delta.low_rank import FACTOR_BITS, FACTOR_WIDTHS

ChannelScale = Literal["none", "rms"]
Rounding = Literal["nearest", "feedback"]
StepRule = Literal["least-squares", "unbiased", "output-unbiased", "layerwise"]

MAX_SALIENT = 4096
MAX_RANK = 1024


@dataclass(frozen=True)
class QuantizerSettings:
    """Settings of `quantize`.

    Attributes:
        bits: what the codes store for a weight, one of `RATES`; 0: there are none, the leading directions stand alone.
        salient: input channels a tensor keeps in 16 bit.
        group_size: input channels that share a step, a multiple of 32; 0 is one step per output channel.
        channel_scale: `rms` scales each input channel by the root mean square of the delta's column.
        rounding: `nearest`, or `feedback` of each column's error to the columns not yet rounded (GPTQ).
        steps: `least-squares` fits the delta, `unbiased` keeps its projection on itself, `output-unbiased` keeps that
            of its outputs on calibration inputs, `layerwise` fits the outputs.
        rank: leading directions of a tensor that are kept, beside the codes if there are any.
        code: `scalar` or `trellis`; None is scalar where a scalar code has these bits.
        factor_bits: bits of a number of the directions' factors.

    Raises:
        ValueError: a value is outside what is listed here.
    """

    bits: float = 2
    salient: int = 8
    group_size: int = 0
    channel_scale: ChannelScale = "none"
    rounding: Rounding = "nearest"
    steps: StepRule = "unbiased"
    rank: int = 0
    code: CodeName | None = None
    factor_bits: int = FACTOR_BITS

    def __post_init__(self) -> None:
        if not 0 <= self.salient <= MAX_SALIENT:
            raise ValueError(f"salient must lie between 0 and {MAX_SALIENT}, not {self.salient}")
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank must lie between 0 and {MAX_RANK}, not {self.rank}")
        if self.factor_bits not in FACTOR_WIDTHS:
            raise ValueError(f"factor bits must be {listed(FACTOR_WIDTHS)}, not {self.factor_bits}")
        for name, allowed in (("channel_scale", ChannelScale), ("rounding", Rounding), ("steps", StepRule)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {getattr(self, name)!r}")
        if not self.bits:
            self._check_without_codes()
            return
        code = self.coding
        if isinstance(code, TrellisCode):
            if self.group_size:
                raise ValueError(
                    f"group size must be 0 for trellis codes, not {self.group_size}: a row shares one step"
                )
            if self.rounding != "nearest":
                raise ValueError(f"rounding must be nearest for trellis codes, not {self.rounding!r}")
        elif self.group_size < 0 or self.group_size % code.group_multiple:
            raise ValueError(f"group size must be 0 or a multiple of {code.group_multiple}, not {self.group_size}")

    def _check_without_codes(self) -> None:
        if not self.rank:
            raise ValueError("bits 0 keeps a delta's leading directions alone: rank must be at least 1")
        of_codes = {"salient": 0, "group_size": 0, "channel_scale": "none", "rounding": "nearest", "code": None}
        given = [name.replace("_", " ") for name, none in of_codes.items() if getattr(self, name) != none]
        if self.needs_gram:
            given.append(f"steps {self.steps!r}")
        if given:
            raise ValueError(f"bits 0 has no codes, to which {', '.join(dict.fromkeys(given))} would belong")

    @property
    def coding(self) -> Code | TrellisCode:
        """The code itself.

        Raises:
            ValueError: there is none.
        """
        return find_code(self.bits, self.code)

    @property
    def is_trellis(self) -> bool:
        """Whether its code is a trellis code."""
        return bool(self.bits) and isinstance(self.coding, TrellisCode)

    @property
    def needs_gram(self) -> bool:
        """Whether the inputs' second moments H = X^T X are needed, not only their energies."""
        return self.rounding == "feedback" or self.steps == "layerwise"
