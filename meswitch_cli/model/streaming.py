"""A model whose weights are in memory only while they are at work: one decoder layer at a time.

The model's own forward runs once over all rows; what makes it stream is that each decoder layer is wrapped to load its
weights when its turn comes, run the rows through in small batches, and drop the weights again. Masks, rotary tables
and every family's particulars stay transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from meswitch_cli.checkpoint.skeleton import materialise_buffers, set_parameter, skeleton
from meswitch_cli.model.build import fill
from meswitch_cli.model.stack import MatrixStack
from meswitch_cli.model.weights import Weights

#: Tokens run through a layer at once; bounds the activations in memory.
BATCH_TOKENS = 4096


class StreamedModel:
    """A transformers model with its weights elsewhere. Call it under `torch.no_grad`.

    Attributes:
        root: the model, on the meta device but for its buffers.
        body: the part of it before the head.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        """Build the module tree.

        Raises:
            CheckpointError: a buffer of this family does not follow from its config.
        """
        self.weights, self.device, self.dtype = weights, device, dtype
        self.held = weights.architecture.held
        root: Any = skeleton(weights.config, weights.name)
        root.set_experts_implementation("eager")  # expert by expert, where others want all matrices at once
        materialise_buffers(root, weights.config, device, weights.name, weights.architecture.held, weights.buffers)
        layers = root.get_submodule(weights.architecture.layers_prefix)
        for index, layer in enumerate(layers):
            layers[index] = _Streamed(layer, partial(self.run_layer, index, layer))
        self.root, self.body = root, getattr(root, root.base_model_prefix)

    def last_hidden_state(self, ids: torch.Tensor) -> torch.Tensor:
        """What reaches the head, `[rows, length, hidden size]`; the embedding is in memory meanwhile."""
        with self.loaded(self.root.base_model_prefix, self.body):
            hidden: torch.Tensor = self.body(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        return hidden

    def run_layer(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A decoder layer's output for `hidden` `[rows, length, hidden size]`."""
        with self.loaded(f"{self.weights.architecture.layers_prefix}.{index}", layer):
            # A position table that a family computes in fp32 makes the first layer's input fp32 too.
            return run_in_batches(layer, hidden.to(self.dtype), args, kwargs)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`[rows, length, vocabulary]`; everything outside the decoder layers is in memory meanwhile."""
        names = [name for name, layer in self.weights.architecture.held.items() if layer is None]
        with self._holding(self.root, "", names):
            logits: torch.Tensor = self.root(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    def loaded(self, prefix: str, module: nn.Module) -> AbstractContextManager[None]:
        """Give a module of the tree its weights for the time of the block."""
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        return self._holding(module, f"{prefix}.", [name for name in names if f"{prefix}.{name}" in self.held])

    @contextmanager
    def _holding(self, module: nn.Module, prefix: str, names: Sequence[str]) -> Iterator[None]:
        stacks = [name for name in names if self.weights.architecture.layout.groups[prefix + name].stack]
        whole = [name for name in names if name not in stacks]
        fill(module, prefix, whole, self.weights, self.device, self.dtype)
        for name in stacks:
            parent, _, leaf = name.rpartition(".")
            vars(module.get_submodule(parent))[leaf] = self._stack(prefix + name)
        try:
            yield
        finally:
            for name in stacks:
                parent, _, leaf = name.rpartition(".")
                del vars(module.get_submodule(parent))[leaf]
            for name in whole:
                parent, _, leaf = name.rpartition(".")
                set_parameter(module, name, getattr(module.get_submodule(parent), leaf).to("meta"))

    def _stack(self, name: str) -> MatrixStack:
        """Experts' matrices, each in memory while it is at work."""
        described = self.weights.architecture

        def matrix(index: int) -> torch.Tensor:
            found = described.matrix(name, index, self.weights.read).to(device=self.device, dtype=self.dtype)
            self.on_matrix(name, index, found)
            return found

        return MatrixStack(described.layout.shapes[name], matrix, self.dtype, self.device)

    def on_matrix(self, name: str, index: int, matrix: torch.Tensor) -> None:
        """Hears of an expert's matrix that the model is about to use."""


class _Streamed(nn.Module):
    """Stands in a decoder layer's place."""

    def __init__(self, layer: nn.Module, run: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: its weights come and go
        self._run = run

    def __getattr__(self, name: str) -> Any:
        """Families read attributes of their layers (attention type and the like)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._run(hidden_states, args, kwargs)


def run_in_batches(layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's output for `hidden` `[rows, length, hidden size]`, `BATCH_TOKENS` tokens at a time."""
    rows, length = hidden.shape[:2]
    size = max(1, BATCH_TOKENS // length)
    outputs = [
        layer(
            hidden[start : start + size],
            *(_batch_of(item, start, size, rows) for item in args),
            **{key: _batch_of(item, start, size, rows) for key, item in kwargs.items()},
        )
        for start in range(0, rows, size)
    ]
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])
    return torch.cat(outputs)


def _batch_of(value: Any, start: int, size: int, rows: int) -> Any:
    """Take the batch out of a tensor that has one row for each of all rows; pass anything else on."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == rows > 1:
        return value[start : start + size]
    if isinstance(value, tuple):
        return tuple(_batch_of(item, start, size, rows) for item in value)
    return value
