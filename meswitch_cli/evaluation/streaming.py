"""Logits of a model that does not fit in memory: one forward, each decoder layer loaded for its turn alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from meswitch_cli.calibration.stream import (
    StreamedLayer,
    materialise_buffers,
    run_in_batches,
    set_parameter,
)
from meswitch_cli.checkpoint.architecture import skeleton
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.evaluation.weights import Weights
from meswitch_cli.token_batches import batches_by_length, padded

#: Tokens, padding included, that pass through the whole model together: their hidden states stay in memory, and the
#: weights are read once for each such group.
GROUP_TOKENS = 1 << 16


@torch.no_grad()
def streamed_logits(
    weights: Weights,
    items: Sequence[EncodedItem],
    device: torch.device,
    dtype: torch.dtype,
    group_tokens: int = GROUP_TOKENS,
) -> Iterator[tuple[int, torch.Tensor]]:
    """As `fidelity.answer_logits`, with one decoder layer's weights in memory at a time, and the embedding."""
    root: Any = skeleton(weights.config, weights.name)
    materialise_buffers(root, device)
    runner = _Runner(weights, device, dtype)
    layers = root.get_submodule(weights.architecture.layers_prefix)
    for index in range(len(layers)):
        layers[index] = StreamedLayer(layers[index], index, runner)
    prefix = root.base_model_prefix
    body, head = getattr(root, prefix), root.get_output_embeddings()
    head_name = next(name for name, module in root.named_modules() if module is head)
    for batch in batches_by_length([len(item.tokens) for item in items], group_tokens, longest_first=True):
        ids = padded([items[index].tokens for index in batch])[0].to(device)
        with runner.loaded(prefix, body):
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        with runner.loaded(head_name, head):
            for row, index in enumerate(batch):
                start, stop = items[index].answer_start - 1, len(items[index].tokens) - 1
                # The family's own forward does what follows the body: the head, and caps or scales on its logits.
                setattr(root, prefix, _Given(hidden[row : row + 1, start:stop]))
                yield index, root(ids[row : row + 1, start:stop], use_cache=False).logits[0].float()
        setattr(root, prefix, body)


class _Given(nn.Module):
    """Stands in the body's place once its hidden states are known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


class _Runner:
    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self.weights, self.device, self.dtype = weights, device, dtype

    @contextmanager
    def loaded(self, prefix: str, module: nn.Module) -> Iterator[None]:
        """Give a meta module its weights for the time of the block."""
        names = [name for name, _ in module.named_parameters()]
        for name in names:
            value = self.weights.read(f"{prefix}.{name}")
            set_parameter(module, name, value.to(device=self.device, dtype=self.dtype))
        try:
            yield
        finally:
            for name in names:
                set_parameter(module, name, module.get_parameter(name).to("meta"))

    def run_layer(
        self, layer: nn.Module, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with self.loaded(f"{self.weights.architecture.layers_prefix}.{index}", layer):
            return run_in_batches(layer, hidden, args, kwargs)
