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

from meswitch_cli.engine.batch import Batch, CurrentBatch
from meswitch_cli.engine.modules import GainedNorm, with_added_logits
from meswitch_kernels import ExpertBank


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
    """What the methods share: the method that they stand in for, the batch, the kernels."""

    def __init__(self, plain: Any, current: CurrentBatch, backend: ModuleType) -> None:
        super().__init__()
        self.plain, self.current, self.backend = plain, current, backend

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

    def __init__(self, plain: Any, parts: Sequence[Rows], current: CurrentBatch, backend: ModuleType) -> None:
        super().__init__(plain, current, backend)
        self.parts = parts

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch = self.current.batch
        if batch is None or all(part.bank is None for part in self.parts):
            y: Tensor = self.plain.apply(layer, x, bias)
            return y
        rows = x.reshape(-1, x.shape[-1])
        check_tokens(batch, rows.shape[0])
        outputs = [
            self.multiply(rows, part, None if bias is None else part.bias, batch.slot_of_token, batch.groups, part.bank)
            for part in self.parts
        ]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return joined.view(*x.shape[:-1], -1)


class ExpertVocabularyMethod(_ExpertMethod):
    """The embedding, the head, or the one layer that is both.

    vLLM knows one vocabulary, as long as the longest: the base's rows, then those that experts added.
    """

    def __init__(
        self,
        plain: Any,
        embedding: Rows | None,
        head: Rows | None,
        width: int,
        current: CurrentBatch,
        backend: ModuleType,
    ) -> None:
        """`width` is the length of that one vocabulary."""
        super().__init__(plain, current, backend)
        self._embedding, self._head, self._width = embedding, head, width

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        batch, rows = self.current.batch, self._embedding
        if batch is None or rows is None or rows.bank is None:
            y: Tensor = self.plain.embedding(layer, ids)
            return y
        flat = ids.reshape(-1)
        check_tokens(batch, flat.shape[0])
        bank = rows.bank
        found: Tensor = self.backend.expert_embedding(
            flat, rows.weight, bank.tensors, bank.added_rows, batch.slot_of_token
        )
        return found.view(*ids.shape, -1)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        batch, rows = self.current.batch, self._head
        if batch is None or rows is None or rows.bank is None:
            y: Tensor = self.plain.apply(layer, x, bias)
            return y
        slots, groups = batch.of_rows(x.shape[0])
        if slots.shape[0] != x.shape[0]:
            raise RuntimeError(f"vLLM asks for logits of {x.shape[0]} tokens, {slots.shape[0]} were announced")
        bank = rows.bank
        y = self.multiply(x, rows, None if bias is None else rows.bias, slots, groups, bank)
        y = with_added_logits(y, x, bank, rows.added_bias, slots, self.backend.added_logits)
        return nn.functional.pad(y, (0, self._width - y.shape[1]), value=-torch.inf)


class ExpertResidualNorm(GainedNorm):
    """A norm, with vLLM's second argument and second result: the residual that it adds first."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        batch = self.batch
        given = (x,) if residual is None else (x, residual)
        if batch is None:
            return self.base(*given)
        check_tokens(batch, x.shape[0])
        result = self.plain(*given)
        y, rest = result if isinstance(result, tuple) else (result, None)
        shape = [x.shape[0]] + [1] * (x.dim() - 2) + [x.shape[-1]]
        y = self.gained(y, batch.gain_rows, shape).to(y.dtype)
        return y if rest is None else (y, rest)


class VocabularyLimits:
    """Each expert's own vocabulary: no later token is ever chosen. A hook on vLLM's logits processor."""

    def __init__(self, vocabulary: int, slots: int, current: CurrentBatch, device: torch.device) -> None:
        self.current = current
        #: `[slots + 1]`, the base's first.
        self.limits = torch.full((slots + 1,), vocabulary, dtype=torch.long, device=device)

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        batch = self.current.batch
        if batch is None:
            limits = self.limits[:1].expand(logits.shape[0])
        else:
            limits = self.limits.index_select(0, batch.of_rows(logits.shape[0])[0].long() + 1)
        places = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(places >= limits[:, None], -torch.inf)


def check_tokens(batch: Batch, tokens: int) -> None:
    """Refuse a forward pass of other tokens than were announced: kernels read as many slots as there are rows.

    Raises:
        RuntimeError: their number differs.
    """
    if batch.slot_of_token.shape[0] != tokens:
        raise RuntimeError(f"vLLM computes {tokens} tokens, {batch.slot_of_token.shape[0]} were announced")
