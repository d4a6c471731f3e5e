"""vLLM's layers, serving experts beside the base.

vLLM lets a layer's arithmetic be exchanged without exchanging the layer: `quant_method` of linears, embedding and
head. Loading, biases and everything about ranks stay the layer's own. Norms have no such place, so they are wrapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from meswitch_cli.engine.step import Step, Steps
from meswitch_kernels import ExpertBank, GainBank


class Rows:
    """Output rows of one of vLLM's weights that are one layer of transformers: q, k and v are rows of one linear.

    Attributes:
        weight: `[rows, in]`, a view.
        bias: `[rows]`, a view, or None.
        bank: None: no expert changes it.
        added_bias: of the head, as in `ExpertHead`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.bank: ExpertBank | None = None
        self.added_bias: Tensor | None = None


class _ExpertMethod(LinearMethodBase):  # type: ignore[misc]
    """What the methods share: the method that they stand in for, the step, the kernels."""

    def __init__(self, plain: Any, steps: Steps, backend: ModuleType) -> None:
        super().__init__()
        self.plain, self.steps, self.backend = plain, steps, backend

    def create_weights(self, layer: nn.Module, *sizes: Any, **options: Any) -> None:
        raise NotImplementedError("the weights were created by the method that this one stands in for")

    def multiply(
        self, x: Tensor, rows: Rows, bias: Tensor | None, slots: Tensor, groups: Any, bank: ExpertBank | None
    ) -> Tensor:
        if bank is None:
            return nn.functional.linear(x, rows.weight, bias)
        y: Tensor = self.backend.expert_linear(x, rows.weight, bias, bank.tensors, slots, groups)
        return y


class ExpertLinearMethod(_ExpertMethod):
    """A linear of one or several parts, each with its own bank: bits, channels, groups and rank may differ."""

    def __init__(self, plain: Any, parts: Sequence[Rows], steps: Steps, backend: ModuleType) -> None:
        super().__init__(plain, steps, backend)
        self.parts = parts

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        step = self.steps.current
        if step is None or all(part.bank is None for part in self.parts):
            y: Tensor = self.plain.apply(layer, x, bias)
            return y
        rows = x.reshape(-1, x.shape[-1])
        check_tokens(step, rows.shape[0])
        outputs = [
            self.multiply(rows, part, None if bias is None else part.bias, step.slot_of_token, step.groups, part.bank)
            for part in self.parts
        ]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return joined.view(*x.shape[:-1], -1)


class ExpertVocabularyMethod(_ExpertMethod):
    """The embedding, the head, or the one layer that is both.

    vLLM knows one vocabulary, as long as the longest: the base's rows, then those that experts added.
    """

    def __init__(
        self, plain: Any, embedding: Rows | None, head: Rows | None, width: int, steps: Steps, backend: ModuleType
    ) -> None:
        """`width` is the length of that one vocabulary."""
        super().__init__(plain, steps, backend)
        self._embedding, self._head, self._width = embedding, head, width

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        step, rows = self.steps.current, self._embedding
        if step is None or rows is None or rows.bank is None:
            y: Tensor = self.plain.embedding(layer, ids)
            return y
        flat = ids.reshape(-1)
        check_tokens(step, flat.shape[0])
        bank = rows.bank
        found: Tensor = self.backend.expert_embedding(
            flat, rows.weight, bank.tensors, bank.added_rows, step.slot_of_token
        )
        return found.view(*ids.shape, -1)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        step, rows = self.steps.current, self._head
        if step is None or rows is None or rows.bank is None:
            y: Tensor = self.plain.apply(layer, x, bias)
            return y
        slots, groups = step.of_rows(x.shape[0])
        if slots.shape[0] != x.shape[0]:
            raise RuntimeError(f"vLLM asks for logits of {x.shape[0]} tokens, {slots.shape[0]} were announced")
        bank = rows.bank
        y = self.multiply(x, rows, None if bias is None else rows.bias, slots, groups, bank)
        if bank.capacity.added_rows:
            added = self.backend.added_logits(x, bank.added_rows, bank.added_counts, slots)
            if rows.added_bias is not None:
                added = added + rows.added_bias.index_select(0, slots.long() + 1)
            y = torch.cat([y, added], 1)
        return nn.functional.pad(y, (0, self._width - y.shape[1]), value=-torch.inf)


class ExpertNorm(nn.Module):
    """A norm, with vLLM's second argument and second result: the residual that it adds first."""

    def __init__(self, base: nn.Module, plain: nn.Module, steps: Steps) -> None:
        """`plain` is `base` with gain 1 and shift 0."""
        super().__init__()
        self.base, self.plain, self.steps = base, plain, steps
        self.gains: GainBank | None = None
        self.shifts: GainBank | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        step = self.steps.current
        given = (x,) if residual is None else (x, residual)
        if step is None or (self.gains is None and self.shifts is None):
            return self.base(*given)
        check_tokens(step, x.shape[0])
        result = self.plain(*given)
        y, rest = result if isinstance(result, tuple) else (result, None)
        shape = [x.shape[0]] + [1] * (x.dim() - 2) + [x.shape[-1]]
        dtype = y.dtype
        if self.gains is not None:
            y = y * self.gains.table.index_select(0, step.gain_rows).view(shape)
        if self.shifts is not None:
            y = y + self.shifts.table.index_select(0, step.gain_rows).view(shape)
        y = y.to(dtype)
        return y if rest is None else (y, rest)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class VocabularyLimits:
    """Each expert's own vocabulary: no later token is ever chosen. A hook on vLLM's logits processor."""

    def __init__(self, vocabulary: int, slots: int, steps: Steps, device: torch.device) -> None:
        self.steps = steps
        #: `[slots + 1]`, the base's first.
        self.limits = torch.full((slots + 1,), vocabulary, dtype=torch.long, device=device)

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        step = self.steps.current
        if step is None:
            limits = self.limits[:1].expand(logits.shape[0])
        else:
            limits = self.limits.index_select(0, step.of_rows(logits.shape[0])[0].long() + 1)
        places = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(places >= limits[:, None], -torch.inf)


def check_tokens(step: Step, tokens: int) -> None:
    """Refuse a forward pass of other tokens than were announced: kernels read as many slots as there are rows.

    Raises:
        RuntimeError: their number differs.
    """
    if step.slot_of_token.shape[0] != tokens:
        raise RuntimeError(f"vLLM computes {tokens} tokens, {step.slot_of_token.shape[0]} were announced")
