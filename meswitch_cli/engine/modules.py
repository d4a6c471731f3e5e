"""The layers of a base that also serve its experts; each is the base's own layer where no expert is in the batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from meswitch_cli.engine.batch import Batch, CurrentBatch
from meswitch_kernels import ExpertBank, GainBank
from meswitch_kernels.dispatch import backend_module, default_backend


@functools.cache
def kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The kernels for a model. Layers call them without the checks of `meswitch_kernels.ops`: the engine has checked
    the slots once for the batch, and the checks would cost as much as a small layer."""
    name = default_backend(device.type)
    return backend_module("naive" if name == "cpu" and dtype == torch.float16 else name)


class ExpertLinear(nn.Module):
    """A linear layer. `bank` None: no expert changes it."""

    def __init__(self, base: nn.Linear, current: CurrentBatch, backend: ModuleType) -> None:
        super().__init__()
        self.weight: Tensor = base.weight
        self.bias: Tensor | None = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.current, self.multiply = current, backend.expert_linear
        #: The product and a residual at once, where the kernels do that.
        self.summed: Callable[..., Tensor] | None = getattr(backend, "summed_linear", None)
        self.bank: ExpertBank | None = None
        #: Those that are given the same input, this one among them.
        self.siblings: Siblings | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, bank = self.current.batch, self.bank
        if batch is None or bank is None:
            return nn.functional.linear(x, self.weight, self.bias)
        if self.siblings is not None:
            y = self.siblings.answer(self, x, batch)
        else:
            y = self.answer(x, batch)
        return y.view(*x.shape[:-1], -1)

    def answer(self, x: Tensor, batch: Batch) -> Tensor:
        """`[tokens, out]` of this layer alone, with the residual that it shall add."""
        rows = x.reshape(-1, x.shape[-1])
        slots, groups = batch.of_tokens(rows.shape[0])
        if self.bank is None or self.summed is None or (residual := batch.take_residual(self)) is None:
            return self.product(rows, slots, groups)
        residual = residual.reshape(-1, residual.shape[-1])
        return self.summed(residual, rows, self.weight, self.bias, self.bank.tensors, slots, groups)

    def product(self, rows: Tensor, slots: Tensor, groups: Any) -> Tensor:
        """`[tokens, out]` for rows of these slots; the layer has a bank, or none that matters."""
        if self.bank is None:
            return nn.functional.linear(rows, self.weight, self.bias)
        y: Tensor = self.multiply(rows, self.weight, self.bias, self.bank.tensors, slots, groups)
        return y


class Siblings:
    """Linears that a model gives the same input, one after the other: the first that is called computes for all."""

    def __init__(self, layers: Sequence[ExpertLinear], backend: ModuleType) -> None:
        self.layers, self.multiply = tuple(layers), backend.expert_linears

    def answer(self, layer: ExpertLinear, x: Tensor, batch: Batch) -> Tensor:
        """`[tokens, out]` of one of the layers, which has a bank."""
        held = batch.held
        if held is None or held[0] is not x or layer not in held[1]:
            rows = x.reshape(-1, x.shape[-1])
            slots, groups = batch.of_tokens(rows.shape[0])
            served = [(item, item.bank.tensors) for item in self.layers if item.bank is not None]
            operands = [(item.weight, item.bias, tensors) for item, tensors in served]
            results = self.multiply(rows, operands, slots, groups)
            held = batch.held = x, dict(zip((item for item, _ in served), results, strict=True))
        return held[1].pop(layer)


class ExpertHead(ExpertLinear):
    """The output head: `[..., vocabulary + most added rows]`, -inf where a token's expert has no such row."""

    def __init__(self, base: nn.Linear, current: CurrentBatch, backend: ModuleType) -> None:
        super().__init__(base, current, backend)
        self.added_logits = backend.added_logits
        #: `[slots + 1, most added rows]` where the head has a bias; its first row is the base's and means nothing.
        self.added_bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, bank = self.current.batch, self.bank
        if batch is None or bank is None:
            return nn.functional.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        slots, groups = batch.of_rows(rows.shape[0])
        y: Tensor = self.multiply(rows, self.weight, self.bias, bank.tensors, slots, groups)
        y = with_added_logits(y, rows, bank, self.added_bias, slots, self.added_logits)
        return y.view(*x.shape[:-1], -1)


def with_added_logits(
    y: Tensor, rows: Tensor, bank: ExpertBank, bias: Tensor | None, slots: Tensor, added_logits: Callable[..., Tensor]
) -> Tensor:
    """Logits `[rows, vocabulary]`, and behind them those of the rows that each row's expert added."""
    if not bank.capacity.added_rows:
        return y
    added = added_logits(rows, bank.added_rows, bank.added_counts, slots)
    return torch.cat([y, added if bias is None else added + bias.index_select(0, slots.long() + 1)], 1)


class ExpertEmbedding(nn.Module):
    """The embedding, with the rows that an expert added; `scale` is what the family multiplies it by, if it does."""

    def __init__(self, base: nn.Embedding, current: CurrentBatch, backend: ModuleType) -> None:
        super().__init__()
        self.base, self.padding_idx = base, base.padding_idx
        self.weight: Tensor = base.weight
        self.scale: Tensor | float | None = getattr(base, "embed_scale", None)
        self.current, self.look_up = current, backend.expert_embedding
        self.bank: ExpertBank | None = None

    def forward(self, ids: Tensor) -> Tensor:
        batch, bank = self.current.batch, self.bank
        if batch is None or bank is None:
            y: Tensor = self.base(ids)
            return y
        slots, _ = batch.of_tokens(ids.numel())
        rows: Tensor = self.look_up(ids.reshape(-1), self.weight, bank.tensors, bank.added_rows, slots)
        if self.scale is not None:
            rows = rows * (self.scale if isinstance(self.scale, float) else self.scale.to(rows.dtype))
        return rows.view(*ids.shape, -1)


class GainedNorm(nn.Module):
    """A norm. With an expert in the batch, the norm without gain, then each token's own gain (and shift).

    The table of gains holds the base's in its first row. The design's ratio to the base's gain would be the same
    number rounded twice, and none where the base's gain is 0.
    """

    def __init__(self, base: Any, plain: Any) -> None:
        """`plain` is `base` with gain 1 and shift 0."""
        super().__init__()
        self.base: Any = base
        self.plain: Any = plain
        self.gains: GainBank | None = None
        self.shifts: GainBank | None = None

    @property
    def may_change(self) -> bool:
        """Whether an expert may change the norm."""
        return self.gains is not None or self.shifts is not None

    def gained(self, y: Tensor, gain_rows: Tensor, shape: Sequence[int]) -> Tensor:
        """`y` with each token's own gain and shift, which are brought to `shape`."""
        if self.gains is not None:
            y = y * self.gains.table.index_select(0, gain_rows).view(shape)
        if self.shifts is not None:
            y = y + self.shifts.table.index_select(0, gain_rows).view(shape)
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class ExpertNorm(GainedNorm):
    """A norm of transformers."""

    def __init__(
        self, base: Any, plain: Any, epsilon: float | None, current: CurrentBatch, backend: ModuleType
    ) -> None:
        """`epsilon` is that of a root mean square norm, None of any other."""
        super().__init__(base, plain)
        self.current = current
        #: Norm and gain at once, where the kernels do that: each row's own gain, and one gain for all rows.
        self.rms_norm = None if epsilon is None else backend.rms_norm
        self.base_norm = None if epsilon is None else backend.base_norm
        self.epsilon = epsilon
        self._base_gain: tuple[Any, Tensor] | None = None
        #: Which dimension of the input is the tokens; norms of heads are given `[1, heads, tokens, width]` or not.
        self.token_dimension = 1

    def forward(self, x: Tensor) -> Tensor:
        batch = self.current.batch if self.may_change else None
        y: Tensor
        if batch is None:
            if self.base_norm is None:
                y = self.base(x)
                return y
            y = self.base_norm(x.reshape(-1, x.shape[-1]), self.epsilon, self.base_gain)
            return y.view(x.shape)
        place = self.token_dimension
        if self.rms_norm and self.gains and not self.shifts and x.shape[place] == batch.gain_rows.shape[0]:
            if x.dim() == 3 and place == 1:
                y = self.rms_norm(x[0], self.epsilon, self.gains.table, batch.gain_rows)
                return y.unsqueeze(0)
            rows = batch.spread_gain_rows(math.prod(x.shape[:place]), math.prod(x.shape[place + 1 : -1]))
            y = self.rms_norm(x.reshape(-1, x.shape[-1]), self.epsilon, self.gains.table, rows)
            return y.view(x.shape)
        shape = [1] * (x.dim() - 1) + [x.shape[-1]]
        shape[place] = x.shape[place]
        return self.gained(self.plain(x), batch.gain_rows, shape).to(x.dtype)

    @property
    def base_gain(self) -> Tensor:
        """The base's gain `[width]`, in the type that `Banks` keeps gains in."""
        weight = self.base.weight
        if self._base_gain is None or self._base_gain[0] is not weight:
            shift = 1.0 - float(self.plain.weight.flatten()[0])
            self._base_gain = weight, weight.detach() if not shift else weight.detach().float() + shift
        return self._base_gain[1]
