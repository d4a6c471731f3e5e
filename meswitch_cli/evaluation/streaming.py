"""Logits of a model that does not fit in memory: one forward, each decoder layer loaded for its turn alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from meswitch_cli.evaluation.fidelity import EncodedItem, batches_by_length, padded
from meswitch_cli.model.streaming import StreamedModel
from meswitch_cli.model.weights import Weights

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
    model = StreamedModel(weights, device, dtype)
    root, prefix, head = model.root, model.root.base_model_prefix, model.root.get_output_embeddings()
    head_name = next(name for name, module in root.named_modules() if module is head)
    for batch in batches_by_length(items, group_tokens):
        ids = padded([items[index] for index in batch]).to(device)
        hidden = model.run(ids)
        with model.loaded(head_name, head):
            for row, index in enumerate(batch):
                start, stop = items[index].answer_start - 1, len(items[index].tokens) - 1
                # The family's own forward does what follows the body: the head, and caps or scales on its logits.
                setattr(root, prefix, _Given(hidden[row : row + 1, start:stop]))
                yield index, root(ids[row : row + 1, start:stop], use_cache=False).logits[0].float()
        setattr(root, prefix, model.body)


class _Given(nn.Module):
    """Stands in the body's place once its hidden states are known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self._hidden)
