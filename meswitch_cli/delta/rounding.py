"""How the rows of one tensor are rounded to multiples of steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from meswitch_cli.delta.codes import TrellisCode, pack, unpack
from meswitch_cli.delta.feedback import FEEDBACK_BLOCK_ELEMENTS, feedback_multiples
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.steps import (
    FIT_ROUNDS,
    codes_of,
    dots,
    grouped,
    initial_steps,
    multiples_of,
    nearest_multiples,
    per_channel,
    step_ratio,
    without,
)
from meswitch_cli.delta.sweep import BLOCK_ELEMENTS
from meswitch_cli.delta.trellis import ROWS_TOGETHER, decode
from meswitch_cli.delta.trellis_encoder import encode

FP16_MAX = 65504.0
_FP16_SMALLEST_NORMAL = 2.0**-14


class RoundingFit(NamedTuple):
    """Multiples `[rows, in]` of a block, two kinds of steps for them `[rows, groups]`, a trellis code's messages."""

    multiples: torch.Tensor
    least_squares: torch.Tensor
    unbiased: torch.Tensor
    messages: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rounder:
    """Rounds blocks of a delta's rows, fp32 `[rows, in]`, which it knows nothing of but their columns.

    Attributes:
        scale: fp32 `[in]`, that the delta's channels are divided by; None stands for ones.
        salient: `[k]`, the channels kept in 16 bit, to which no step is fitted.
        gram: `[in, in]` fp32, of the inputs times `scale`, where the settings need it.
        factor: `inverse_factor(gram)` for error feedback; None rounds to nearest.
        output_factor: what `output-unbiased` steps are, over unbiased ones.
    """

    settings: QuantizerSettings
    scale: torch.Tensor | None
    salient: torch.Tensor
    gram: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    output_factor: float = 1.0

    @cached_property
    def _inverse_scale(self) -> torch.Tensor | None:
        return None if self.scale is None else torch.where(self.scale > 0, 1 / self.scale, torch.zeros_like(self.scale))

    def block_elements(self, columns: int) -> int | None:
        """Elements of the blocks that suit it; None as most work."""
        if isinstance(self.settings.coding, TrellisCode):
            together = ROWS_TOGETHER * columns
            return max(1, BLOCK_ELEMENTS // together) * together
        return None if self.factor is None else FEEDBACK_BLOCK_ELEMENTS

    def scaled(self, block: torch.Tensor) -> torch.Tensor:
        """The block as its codes see it: itself where there is no scale."""
        return block if self._inverse_scale is None else block * self._inverse_scale

    def spread(self, multiples: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What multiples `[rows, in]` of steps `[rows, groups]` are, before the scale."""
        return multiples * per_channel(steps, multiples.shape[1], self.settings.group_size)

    def values(self, multiples: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """What multiples of steps are, in the delta's own units."""
        values = self.spread(multiples, steps)
        return values if self.scale is None else values.mul_(self.scale)

    def code(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed codes, final steps and the columns' squared norms of a block, which then lacks the codes' values."""
        squares = block.square()
        energy = squares.sum(0)
        scaled = self.scaled(block)
        fit = self.rounded(scaled, squares if scaled is block else None)
        steps = self._final_steps(scaled, fit)
        width = self.settings.coding.width
        packed = pack(codes_of(fit.multiples, width), width) if fit.messages is None else fit.messages
        block -= self.values(fit.multiples, steps)
        return packed.cpu(), steps.cpu(), energy

    def rounded(self, block: torch.Tensor, squares: torch.Tensor | None = None) -> RoundingFit:
        """The multiples that are kept of a scaled block, by error feedback where asked, and steps for them."""
        fit = self.fit(block, FIT_ROUNDS, squares)
        if self.factor is None:
            return fit
        exact = torch.zeros(block.shape[1], device=block.device).index_fill_(0, self.salient, 1.0)
        spread = per_channel(fit.least_squares, block.shape[1], self.settings.group_size)
        multiples = feedback_multiples(block, spread, self.settings.coding.width, self.factor, exact)
        return self._measured(block, multiples, self._row_sums(block.square()))

    def fit(self, block: torch.Tensor, rounds: int, squares: torch.Tensor | None = None) -> RoundingFit:
        """Nearest multiples and their least-squares steps, fitted in turns on the channels that are not salient.

        `squares` are the block's where they are known; they are overwritten.
        """
        code, group_size = self.settings.coding, self.settings.group_size
        channels = torch.ones(1, block.shape[1], device=block.device).index_fill_(1, self.salient, 0.0)
        energy = self._row_sums(block.square() if squares is None else squares)
        if isinstance(code, TrellisCode):  # its search needs no step, and one search is enough
            messages = encode(block, code, channels[0] > 0)
            codes = unpack(decode(messages, code, block.shape[1]), code.width, block.shape[1])
            return self._measured(block, multiples_of(codes, code.width), energy)._replace(messages=messages)
        bits = code.width
        steps = initial_steps(energy, bits, grouped(channels, group_size).sum(-1))
        for _ in range(1 if bits == 1 else rounds):  # at 1 bit the multiple is the sign's, whatever the step
            multiples = nearest_multiples(block, per_channel(steps, block.shape[1], group_size), bits)
            fit = self._measured(block, multiples, energy)
            steps = fit.least_squares
        return fit

    def _measured(self, block: torch.Tensor, multiples: torch.Tensor, energy: torch.Tensor) -> RoundingFit:
        own = self._row_sums(multiples.square())
        projection = self._row_sums(multiples * block)
        return RoundingFit(multiples, step_ratio(projection, own), step_ratio(energy, projection))

    def _row_sums(self, products: torch.Tensor) -> torch.Tensor:
        """Sums `[rows, groups]` over the channels that are not salient; the products are overwritten in the others."""
        if self.salient.numel():
            products.index_fill_(1, self.salient, 0.0)
        return grouped(products, self.settings.group_size).sum(-1)

    def _final_steps(self, block: torch.Tensor, fit: RoundingFit) -> torch.Tensor:
        rule = self.settings.steps
        steps = fit.unbiased if rule in ("unbiased", "output-unbiased") else fit.least_squares
        if rule == "output-unbiased":
            steps = steps * self.output_factor
        if rule == "layerwise" and self.gram is not None:
            # One factor a row: groups keep the proportions that least squares gave them.
            values = without(self.spread(fit.multiples, steps), self.salient)
            projected = values @ self.gram
            steps = steps * step_ratio(dots(projected, without(block, self.salient), 0), dots(projected, values, 0))
        if not self.settings.group_size:
            return steps
        # Grouped steps are stored in fp16 where they fit: rounded here, so that residuals are taken after it.
        return steps.half().float() if _fits_half(steps) else steps


def _fits_half(steps: torch.Tensor) -> bool:
    positive = steps[steps > 0]
    return positive.numel() == 0 or bool(positive.min() >= _FP16_SMALLEST_NORMAL and positive.max() <= FP16_MAX)


def sixteen_bit(values: torch.Tensor) -> torch.Tensor:
    """Values as fp16, the largest that there is in place of what lies beyond."""
    return values.clamp(-FP16_MAX, FP16_MAX).half()
