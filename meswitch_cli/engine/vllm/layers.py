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

from meswitch_cli.engine.modules import GainedNorm, with_added_logits
from meswitch_cli.engine.vllm.announced import AnnouncedTokens
from meswitch_cli.engine.vllm.operators import announce_layer, call
from meswitch_cli.engine.vllm.shards import LayerShard
from meswitch_kernels import ExpertBank


class Rows:
    """Output rows of one of vLLM's weights that are one layer of transformers: q, k and v are rows of one linear.

    Attributes:
        weight: `[rows, in]`, a view.
        bias: `[rows]`, a view, or None.
        shard: which part of transformers' weight that is.
        bank: None: no expert changes it.
        added_bias: of the head, as in `ExpertHead`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, shard: LayerShard) -> None:
        self.weight, self.bias, self.shard = weight, bias, shard
        self.bank: ExpertBank | None = None
        self.added_bias: Tensor | None = None


class _ExpertMethod(LinearMethodBase):  # type: ignore[misc]
    """What the methods share: the method that they stand in for, the tokens announced, the kernels."""

    def __init__(self, plain: Any, announced: AnnouncedTokens, backend: ModuleType) -> None:
        super().__init__()
        self.plain, self.announced, self.backend = plain, announced, backend

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

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        parts: Sequence[Rows],
        announced: AnnouncedTokens,
        backend: ModuleType,
        quantised: bool = False,
    ) -> None:
        """`quantised`: the parts' weights are zeros, and vLLM's own method computes the base's product."""
        super().__init__(layer.quant_method, announced, backend)
        self.layer, self.name, self.parts, self.quantised = layer, name, parts, quantised
        announce_layer(name, self)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return call(self, self.name, x, bias is not None)

    def compute(self, x: Tensor, biased: bool) -> Tensor:
        batch = None if all(part.bank is None for part in self.parts) else self.announced.batch(_rows(x))
        if batch is None:
            y: Tensor = self.plain.apply(self.layer, x, self.layer.bias if biased else None)
            return y
        rows = x.reshape(-1, x.shape[-1])
        biased_here = biased and not self.quantised
        outputs = [
            self.multiply(rows, part, part.bias if biased_here else None, batch.slot_of_token, batch.groups, part.bank)
            for part in self.parts
        ]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        joined = joined.view(*x.shape[:-1], -1)
        if self.quantised:
            joined = joined + self.plain.apply(self.layer, x, self.layer.bias if biased else None)
        return joined

    def empty(self, x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-1], sum(part.weight.shape[0] for part in self.parts))


class ExpertVocabularyMethod(_ExpertMethod):
    """The embedding, the head, or the one layer that is both.

    vLLM knows one vocabulary, as long as the longest: the base's rows, then those that experts added.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        embedding: Rows | None,
        head: Rows | None,
        announced: AnnouncedTokens,
        backend: ModuleType,
    ) -> None:
        super().__init__(layer.quant_method, announced, backend)
        self.layer, self.name, self._embedding, self._head = layer, name, embedding, head
        announce_layer(name, self)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        return call(self, self.name, ids, False)

    def compute(self, ids: Tensor, biased: bool) -> Tensor:
        rows = self._embedding
        batch = None if rows is None or rows.bank is None else self.announced.batch(ids.numel())
        if rows is None or rows.bank is None or batch is None:
            y: Tensor = self.plain.embedding(self.layer, ids)
            return y
        bank = rows.bank
        found: Tensor = self.backend.expert_embedding(
            ids.reshape(-1), rows.weight, bank.tensors, bank.added_rows, batch.slot_of_token
        )
        return found.view(*ids.shape, -1)

    def empty(self, ids: Tensor) -> Tensor:
        weight: Any = self.layer.weight
        return ids.new_empty((*ids.shape, weight.shape[1]), dtype=weight.dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = self._head
        batch = None if rows is None or rows.bank is None else self.announced.rows(x)
        if rows is None or rows.bank is None or batch is None:
            y: Tensor = self.plain.apply(layer, x, bias)
            return y
        bank = rows.bank
        slots, groups = batch.slot_of_token, batch.groups
        y = self.multiply(x, rows, None if bias is None else rows.bias, slots, groups, bank)
        y = with_added_logits(y, x, bank, rows.added_bias, slots, self.backend.added_logits)
        weight: Any = layer.weight
        return nn.functional.pad(y, (0, weight.shape[0] - y.shape[1]), value=-torch.inf)


class ExpertResidualNorm(GainedNorm):
    """A norm, with vLLM's second argument and second result: the residual that it adds first.

    With gains of experts, the norm without its gain, then each token's own from a table whose first row is the base's.
    Where torch.compile traces, that is what is traced, whoever is in the batch: its rows are in memory that stays.
    """

    def __init__(self, base: Any, plain: Any, announced: AnnouncedTokens, token_dim: int = 0) -> None:
        """`plain` is `base` with gain 1 and shift 0; `token_dim` is the dimension of x that counts tokens."""
        super().__init__(base, plain)
        self.announced, self.token_dim = announced, token_dim

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        given = (x,) if residual is None else (x, residual)
        if not self.may_change:
            return self.base(*given)
        tokens = x.shape[self.token_dim]
        if not torch.compiler.is_compiling() and self.announced.batch(tokens) is None:
            return self.base(*given)
        result = self.plain(*given)
        y, rest = result if isinstance(result, tuple) else (result, None)
        shape = [1] * y.dim()
        shape[self.token_dim], shape[-1] = tokens, y.shape[-1]
        y = self.gained(y, self.announced.gain_rows[:tokens], shape).to(y.dtype)
        return (y, rest) if isinstance(result, tuple) else y


class VocabularyLimits:
    """Each expert's own vocabulary: no later token is ever chosen. A hook on vLLM's logits processor."""

    def __init__(self, vocabulary: int, slots: int, announced: AnnouncedTokens, device: torch.device) -> None:
        self.announced = announced
        #: `[slots + 1]`, the base's first.
        self.limits = torch.full((slots + 1,), vocabulary, dtype=torch.long, device=device)

    def __call__(self, module: nn.Module, inputs: Any, logits: Tensor | None) -> Tensor | None:
        if logits is None:
            return None
        batch = self.announced.rows(inputs[1])
        if batch is None:
            limits = self.limits[:1].expand(logits.shape[0])
        else:
            limits = self.limits.index_select(0, batch.gain_rows)
        places = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(places >= limits[:, None], -torch.inf)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]
