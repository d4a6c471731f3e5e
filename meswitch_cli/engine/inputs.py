"""The tensors of a batch, as transformers fills them: in host memory first where the device is another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import stream_context


@dataclass(frozen=True)
class Prompt:
    """Neighbouring tokens of one request.

    Attributes:
        start, end: their places in the batch.
        keys: by kind of layer, how many keys the request has with them.
    """

    start: int
    end: int
    keys: dict[str, int]


@dataclass(frozen=True)
class BatchLayout:
    """How a batch's tokens fall into requests, known without asking the device.

    Attributes:
        prompts: requests of several tokens.
        singles: int32 `[requests]`, the places of the tokens that are alone of their request; on the device.
        tables: int32 `[kinds of layers, requests, pages]`, the pages of their keys.
    """

    prompts: tuple[Prompt, ...]
    singles: Tensor
    tables: Tensor


class BatchInputs(ContinuousBatchingIOs):  # type: ignore[misc]
    """transformers' inputs and outputs of one batch after the other.

    `staged`, the batch is put together in host memory and copied at once: filled where they lie, the tensors would cost
    a GPU some twenty small copies a batch, each of which the thread waits for. Chosen tokens stay in host memory.

    Attributes:
        layout: of the last batch, where it is staged.
        mixed: whether the batch has tokens of an expert; a batch of the base alone has graphs of its own.
        new_tokens: what was chosen, for the requests that have a new token.
    """

    def __init__(self, *, staged: bool, **options: Any) -> None:
        super().__init__(**options)
        self.mixed = True
        self.new_tokens: list[int] = []
        self.layout: BatchLayout | None = None
        self._host: Any = None
        if staged:
            self._host = ContinuousBatchingIOs(**(options | {"device": torch.device("cpu")}))
            self._host_singles = _like(self._host.logits_indices)
            self._singles = torch.zeros_like(self.logits_indices)

    def prepare_batch_tensors(
        self,
        requests_in_batch: list[FutureRequestState],
        logits_processors: Any,
        use_decode_fast_path: bool,
        num_q_tokens: int,
        max_kv_read: int,
        use_padding: bool,
    ) -> None:
        options = (logits_processors, use_decode_fast_path, num_q_tokens)
        host = self._host
        if host is None:
            super().prepare_batch_tensors(requests_in_batch, *options, max_kv_read, use_padding)
            return
        # Tokens alone of their request read the pages themselves.
        gathers = any(item.query_length > 1 and item.state.position_offset for item in requests_in_batch)
        host.prepare_batch_tensors(requests_in_batch, *options, max_kv_read if gathers else 0, use_padding)
        self.requests_in_batch = host.requests_in_batch
        self.req_id_to_new_token_position = host.req_id_to_new_token_position
        host._transfer_inputs(self, self.compute_stream, non_blocking=True)
        self.layout = None if host.use_block_table else self._copied_layout()

    def _copied_layout(self) -> BatchLayout:
        host, place = self._host, 0
        prompts: list[Prompt] = []
        singles: list[int] = []
        for item in self.requests_in_batch:
            past, count = item.state.position_offset - item.query_length, item.query_length
            if count == 1:
                self.cache.fill_block_table(item.state.request_id, past, 1, host.block_table[:, len(singles)])
                singles.append(place)
            else:
                allocators = self.cache.cache_allocators.items()
                keys = {name: int(allocator.get_seqlen_k(past, count)) for name, allocator in allocators}
                prompts.append(Prompt(place, place + count, keys))
            place += count
        count = len(singles)
        if singles:
            self._host_singles[:count] = torch.tensor(singles, dtype=torch.int32)
            with stream_context(self.compute_stream):
                self._singles.copy_(self._host_singles, non_blocking=True)
                self.block_table.copy_(host.block_table, non_blocking=True)
        return BatchLayout(tuple(prompts), self._singles[:count], self.block_table[:, :count])

    def prepare_batch_update(self) -> tuple[list[FutureRequestState], list[int], None]:
        return self.requests_in_batch, self.new_tokens, None

    def reset(self) -> None:
        super().reset()
        if self._host is not None:
            self._host.reset()

    def _get_graph_key(self) -> tuple[int, ...]:
        return (*super()._get_graph_key(), int(self.mixed))


def _like(tensor: Tensor) -> Tensor:
    """Zeros in memory of the same kind, pinned if it is."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_pinned())
