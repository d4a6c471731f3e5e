"""A model whose weights are in memory only while they are at work: one decoder layer at a time.

The body's own forward, with stand-ins in the layers' places, shows what each layer is given beside the hidden state.
The layers are run one after another by that, and the same forward makes of the last one's output what comes after them.
So masks, rotary tables and every family's particulars stay transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.build import fill
from meswitch_cli.model.skeleton import materialise_buffers, set_parameter, skeleton
from meswitch_cli.model.weights import Weights

#: Tokens run through a layer at once; bounds the activations in memory.
BATCH_TOKENS = 4096

T = TypeVar("T")
#: What a decoder layer's place is called with, and gives back.
_Answer = Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], Any]


class StreamedModel:
    """A transformers model with its weights elsewhere. Call it under `torch.no_grad`.

    Attributes:
        root: the model, on the meta device but for its buffers.
        body: the part of it before the head.
        last_hidden_state: what reaches the head, `[rows, length, hidden size]`, once all layers have run.
    """

    last_hidden_state: torch.Tensor

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        """Build the module tree.

        Raises:
            CheckpointError: a buffer of this family does not follow from its config.
        """
        self.weights, self.device, self.dtype = weights, device, dtype
        root: Any = skeleton(weights.config, weights.name)
        materialise_buffers(root, device, weights.name)
        modules = root.get_submodule(weights.architecture.layers_prefix)
        self._layers = list(modules)
        self._places = [_Place(layer) for layer in self._layers]
        for index, place in enumerate(self._places):
            modules[index] = place
        self.root, self.body = root, getattr(root, root.base_model_prefix)

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """`last_hidden_state` of token ids `[rows, length]`."""
        for _ in self.layers(ids, lambda index, layer: nullcontext()):
            pass
        return self.last_hidden_state

    def layers(
        self, ids: torch.Tensor, watch: Callable[[int, nn.Module], AbstractContextManager[T]]
    ) -> Iterator[tuple[int, T]]:
        """Run token ids `[rows, length]` through the decoder layers in order, and through what comes after them.

        `watch` is entered while a layer runs. Once it has run, and its weights are gone, (index, what `watch` gave) is
        yielded. The embedding stays in memory throughout.

        Raises:
            CheckpointError: this family does something to the hidden state between its layers.
        """
        ids, prefix = ids.to(self.device), self.weights.architecture.layers_prefix
        with self.loaded(self.root.base_model_prefix, self.body):
            hidden, given = self._look(ids, None)
            for index, layer in enumerate(self._layers):
                with watch(index, layer) as watched, self.loaded(f"{prefix}.{index}", layer):
                    output = run_in_batches(layer, hidden, *given[index])
                hidden = _hidden_of(output)
                if index == 0:
                    hidden, given = self._look(ids, output)
                yield index, watched
                del watched  # it may be large, and the next layer is about to run
            self.last_hidden_state = self._forward(ids, lambda *_: output)

    @contextmanager
    def loaded(self, prefix: str, module: nn.Module) -> Iterator[None]:
        """Give a module of the tree its weights for the time of the block."""
        names = [name for name, _ in module.named_parameters()]
        fill(module, f"{prefix}.", names, self.weights, self.device, self.dtype)
        try:
            yield
        finally:
            for name in names:
                set_parameter(module, name, module.get_parameter(name).to("meta"))

    def _look(
        self, ids: torch.Tensor, output: Any
    ) -> tuple[torch.Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """The hidden state that reaches the layers, and what each of them is given beside it.

        What a layer gives back differs by family: before one has run (`output` None), the first is all that is seen.
        """
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states: list[torch.Tensor] = []

        def note(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given.append((args, kwargs))
            states[:] = [hidden]
            if len(given) > 1 and hidden is not _hidden_of(output):
                raise CheckpointError(
                    f"{self.weights.name}: {self.root.config.model_type} does more between its decoder layers than "
                    "hand the hidden state on, so they cannot be run one at a time: --calibration none, --mode resident"
                )
            if output is None or len(given) == len(self._layers):
                raise _Seen
            return output

        try:
            self._forward(ids, note)
        except _Seen:
            return states[0], given
        raise AssertionError("a forward that calls no layer")

    def _forward(self, ids: torch.Tensor, answer: _Answer) -> torch.Tensor:
        for place in self._places:
            place.answer = answer
        hidden: torch.Tensor = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return hidden


class _Seen(Exception):
    """Ends a forward of which nothing more is wanted."""


class _Place(nn.Module):
    """Stands in a decoder layer's place."""

    answer: _Answer

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: its weights come and go

    def __getattr__(self, name: str) -> Any:
        """Families read attributes of their layers (attention type and the like)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.answer(hidden_states, args, kwargs)


def _hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in what a layer gives back."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


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
