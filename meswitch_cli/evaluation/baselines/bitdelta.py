"""BitDelta: one sign mask or several, each with one scale, which may be trained until the logits are the expert's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.baselines.method import Approximation, Inputs, Method, Trained, packed_bytes
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import Weights


@dataclass(frozen=True, kw_only=True)
class BitDelta(Method):
    """`bitdelta`, its scales trained for `distill` updates."""

    masks: Literal[1, 2, 3, 4] = 1
    distill: int = 0

    @property
    def needs_calibration(self) -> bool:
        return self.distill > 0

    def approximate(self, delta: torch.Tensor, statistics: Inputs = None, name: str = "") -> Approximation:
        return bitdelta(delta, self.masks)

    def train(self, start: Weights, expert: Weights, base: Weights, activations: Activations) -> Trained:
        """As `distil_scales`; student and teacher are in memory meanwhile."""
        if not self.distill:
            return {}
        student, teacher = (build_model(weights, torch.device("cpu"), torch.float32) for weights in (start, expert))
        linears = {}
        for name, item in start.architecture.parameters.items():
            if item.kind == "linear" and name in start.architecture.held:
                own = base.read(name).float()
                linears[name] = (own, expert.read(name).float() - own)
        return distil_scales(student, teacher, linears, self.masks, activations.windows(), ScaleTraining(self.distill))


def bitdelta_start(delta: torch.Tensor) -> torch.Tensor:
    """BitDelta before distillation: the sign of each entry times the matrix's mean magnitude (arXiv 2402.10193, eq. 3).

    `delta` is `[out, in]`; entries that are zero count as negative, as in its packed form.
    """
    return signs(delta) * delta.abs().mean()


def signs(delta: torch.Tensor) -> torch.Tensor:
    """1 where an entry is positive, else −1."""
    return torch.where(delta > 0, 1.0, -1.0)


def bitdelta(delta: torch.Tensor, masks: int = 1) -> Approximation:
    """BitDelta with one sign mask or several, each on what the ones before leave (its fair rival at 2 bits)."""
    total = torch.zeros_like(delta)
    for _ in range(masks):
        total += bitdelta_start(delta - total)
    return Approximation(total, masks * (packed_bytes(delta.shape, 1) + 2))


@dataclass(frozen=True)
class ScaleTraining:
    """Settings of `distil_scales`.

    Scales are trained as factors of their starting values, at this learning rate: the authors' 1e-4 is for the scales
    themselves and larger models; a delta here may be smaller than that. Batches as theirs: 4 windows of 128 tokens.
    """

    updates: int
    learning_rate: float = 5e-3
    windows: int = 4
    length: int = 128


class ScaledSigns(nn.Module):
    """A linear whose weight is the base's plus sign masks `[out, in]`, each with one trainable factor."""

    def __init__(self, base: torch.Tensor, delta: torch.Tensor, masks: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        parts, rest = [], delta
        for _ in range(masks):
            parts.append(bitdelta_start(rest))
            rest = rest - parts[-1]
        self.base, self.parts, self.bias = base, parts, bias
        self.factors = nn.Parameter(torch.ones(masks))

    def delta(self) -> torch.Tensor:
        return torch.stack([factor * part for factor, part in zip(self.factors, self.parts, strict=True)]).sum(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.base + self.delta(), self.bias)


def distil_scales(
    student: Any,
    teacher: Any,
    linears: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    masks: int,
    tokens: torch.Tensor,
    training: ScaleTraining,
) -> dict[str, torch.Tensor]:
    """Train the factors and return each linear's delta `[out, in]`, by weight name.

    Args:
        student: transformers model whose other weights are already what they shall be; its linears are replaced.
        teacher: the full expert, of the same family.
        linears: base weight and delta, fp32, by weight name.
        masks: sign masks of each.
        tokens: calibration windows `[n, length]`; shorter pieces are cut from them.
        training: updates and batches.

    The loss is the mean squared error of the logits (arXiv 2402.10193, eq. 5), the optimiser AdamW with a cosine to 0.
    """
    modules: dict[str, ScaledSigns] = {}
    for name, (base, delta) in linears.items():
        owner_name, _, leaf = name.removesuffix(".weight").rpartition(".")
        owner = student.get_submodule(owner_name)
        modules[name] = ScaledSigns(base, delta, masks, getattr(owner, leaf).bias)
        setattr(owner, leaf, modules[name])
    factors = [module.factors for module in modules.values()]
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for factor in factors:
        factor.requires_grad_(True)
    optimiser = torch.optim.AdamW(factors, lr=training.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, training.updates))
    batches = _batches(tokens, training)
    for _ in range(training.updates):
        ids = next(batches)
        with torch.no_grad():
            wanted = teacher(ids, use_cache=False).logits
        loss = nn.functional.mse_loss(student(ids, use_cache=False).logits, wanted)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return {name: module.delta().detach() for name, module in modules.items()}


def _batches(tokens: torch.Tensor, training: ScaleTraining) -> Iterator[torch.Tensor]:
    """Pieces of the windows in order, from the first again when they run out."""
    length = min(training.length, tokens.shape[1])
    starts = range(0, tokens.shape[1] - length + 1, length)
    pieces = torch.cat([tokens[:, start : start + length] for start in starts])
    position = 0
    while True:
        picks = [(position + offset) % len(pieces) for offset in range(min(training.windows, len(pieces)))]
        position += len(picks)
        yield pieces[picks]
