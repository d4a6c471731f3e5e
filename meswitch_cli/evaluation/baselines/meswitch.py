"""meswitch's own scheme, with another choice of salient channels for ablations at equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from meswitch_cli.compression.settings import EMBEDDING_FACTOR_BITS
from meswitch_cli.delta.codes import RATES, TRELLIS_CODES, CodeName
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import ChannelScale, QuantizerSettings, StepRule
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.delta.stored import expected_entry
from meswitch_cli.evaluation.baselines.activations import Activations, ActivationSource
from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, quantised

Saliency = Literal["error", "random", "magnitude", "activation"]


@dataclass(frozen=True, kw_only=True)
class MeSwitch(Method):
    """`meswitch`: as `QuantizerSettings`; `activations` says what the input statistics are taken over.

    At 0 bits salient channels, scale and steps are those of a head, which has codes. `embedding_rank` directions stand
    beside the codes of embedding and head.
    """

    bits: float = 2
    salient: int = 8
    group: int = 0
    channel_scale: ChannelScale = "none"
    steps: StepRule = "unbiased"
    rank: int = 0
    factor_bits: Literal[4, 8, 16] = 4
    embedding_rank: int = 0
    code: Literal["auto", "scalar", "trellis"] = "auto"
    saliency: Saliency = "error"
    activations: ActivationSource = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency == "activation" and self.activations == "none":
            raise ValueError("saliency=activation needs activations")
        self.quantizer()

    def can_have_bits(self, bits: float) -> bool:
        return super().can_have_bits(bits) or (bits == 0 and self.rank > 0)

    def quantizer(self) -> QuantizerSettings:
        """Settings of the linears; ValueError where they cannot be."""
        if not self.bits:
            return QuantizerSettings(bits=0, salient=0, rank=self.rank, factor_bits=self.factor_bits)
        return self._of_codes(self.bits, None if self.code == "auto" else self.code)

    def _of_codes(self, bits: float, code: CodeName | None) -> QuantizerSettings:
        return QuantizerSettings(
            bits=bits,
            salient=self.salient,
            group_size=self.group,
            channel_scale=self.channel_scale,
            steps=self.steps,
            rank=self.rank,
            factor_bits=self.factor_bits,
            code=code,
        )

    EMBEDDING_WIDTHS = (*RATES, 16)

    @property
    def needs_calibration(self) -> bool:
        return self.steps == "layerwise" or self.activations == "file"

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        return salient_delta(delta, self.quantizer(), self.saliency, statistics, self.generator(name))

    def vocabulary(self, kind: str, delta: torch.Tensor, statistics: Inputs = None) -> Approximation:
        """As an artifact's: by a trellis code where the linears have one; a head has its salient channels too."""
        trellis = self.quantizer().is_trellis and self.embedding in TRELLIS_CODES
        code: CodeName | None = "trellis" if trellis else None
        own = (
            self._of_codes(self.embedding, code) if kind == "head" else QuantizerSettings(self.embedding, 0, code=code)
        )
        settings = replace(own, rank=self.embedding_rank, factor_bits=EMBEDDING_FACTOR_BITS)
        return quantised(delta, settings, statistics if kind == "head" else None)

    def statistics(self, activations: Activations) -> Mapping[str, InputStatistics]:
        by_outputs = self.steps in ("layerwise", "output-unbiased")
        if not (self.salient or by_outputs):
            return {}
        gram = self.steps == "layerwise" or (by_outputs and activations.is_data(self.activations))
        return activations.statistics(self.activations, gram=gram)


def salient_delta(
    delta: torch.Tensor,
    settings: QuantizerSettings,
    saliency: Saliency,
    statistics: InputStatistics | None,
    generator: torch.Generator,
) -> Approximation:
    """Quantise `[out, in]` with `settings`, the k salient channels being those with the largest score.

    Scores: `error` is meswitch's own E_i; `magnitude` the squared norm of the delta's column; `activation` the
    energy of the input channel; `random` draws them.

    Raises:
        ValueError: `activation` without statistics.
    """
    if saliency == "error" or not settings.salient:
        return quantised(delta, settings, statistics)
    chosen = _score(delta, saliency, statistics, generator).topk(settings.salient).indices.sort().values
    return with_channels(delta, settings, chosen, statistics)


def with_channels(
    delta: torch.Tensor, settings: QuantizerSettings, chosen: torch.Tensor, statistics: InputStatistics | None
) -> Approximation:
    """Quantise with these salient channels `[k]`: steps are fitted on the others, so the others are quantised alone.

    Raises:
        ValueError: the settings have groups.
    """
    if settings.group_size:
        raise ValueError("salient channels can be chosen freely without groups only: set group=0")
    rest = torch.ones(delta.shape[1], dtype=torch.bool)
    rest[chosen] = False
    alone = replace(settings, salient=0)
    value = delta.half().float()  # what a salient channel's code and residual add up to, to 16 bit
    found = quantize(torch.zeros_like(delta[:, rest]), delta[:, rest].contiguous(), alone, _part(statistics, rest))
    value[:, rest] = dequantize(found[0]) if found else 0.0
    return Approximation(value, expected_entry(settings, tuple(delta.shape)).expected_nbytes(2))


def _score(
    delta: torch.Tensor, saliency: Saliency, statistics: InputStatistics | None, generator: torch.Generator
) -> torch.Tensor:
    if saliency == "random":
        return torch.rand(delta.shape[1], generator=generator)
    if saliency == "magnitude":
        return delta.square().sum(0)
    if statistics is None:
        raise ValueError("saliency=activation needs calibration data")
    return statistics.energy


def _part(statistics: InputStatistics | None, rest: torch.Tensor) -> InputStatistics | None:
    if statistics is None:
        return None
    gram = None if statistics.gram is None else statistics.gram[rest][:, rest]
    inputs = None if statistics.inputs is None else statistics.inputs[:, rest]
    return InputStatistics(statistics.energy[rest], gram, statistics.tokens, inputs)
