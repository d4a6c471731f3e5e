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
class BatchLayout:
    """How a batch's tokens fall into requests; all tensors are int32 and on the device.

    Attributes:
        singles: `[requests]`, the places of the tokens that are alone of their request.
        prompts: `[requests, 4]`, of the others: place of the first token, number of tokens, tokens before them, and the
            row of `tables`.
        counts: the numbers of tokens, known to the host.
        tables: `[kinds of layers, requests, pages]`, the pages of every request, those of `singles` first.
    """

    singles: Tensor
    prompts: Tensor
    counts: tuple[int, ...]
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
            self._host_places = torch.zeros(5, len(self.logits_indices), dtype=torch.int32)
            if self.device.type == "cuda":
                self._host_places = self._host_places.pin_memory()
            self._places = self._host_places.to(self.device)

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
        host.prepare_batch_tensors(requests_in_batch, *options, 0, use_padding)  # pages are read, and no listed rows
        self.requests_in_batch = host.requests_in_batch
        self.req_id_to_new_token_position = host.req_id_to_new_token_position
        host._transfer_inputs(self, self.compute_stream, non_blocking=True)
        self.layout = None if host.use_block_table else self._copied_layout()

    def _copied_layout(self) -> BatchLayout:
        host, place = self._host, 0
        singles: list[int] = []
        prompts: list[tuple[int, int, int, int]] = []
        alone = sum(item.query_length == 1 for item in self.requests_in_batch)
        for item in self.requests_in_batch:
            past, count = item.state.position_offset - item.query_length, item.query_length
            row = len(singles) if count == 1 else alone + len(prompts)
            self.cache.fill_block_table(item.state.request_id, past, count, host.block_table[:, row])
            if count == 1:
                singles.append(place)
            else:
                prompts.append((place, count, past, row))
            place += count
        requests = alone + len(prompts)
        self._host_places[0, :alone] = torch.tensor(singles, dtype=torch.int32)
        if prompts:
            self._host_places[1:].view(-1)[: 4 * len(prompts)] = torch.tensor(prompts, dtype=torch.int32).view(-1)
        with stream_context(self.compute_stream):
            self._places.copy_(self._host_places, non_blocking=True)
            self.block_table.copy_(host.block_table, non_blocking=True)
        return BatchLayout(
            self._places[0, :alone],
            self._places[1:].view(-1)[: 4 * len(prompts)].view(-1, 4),
            tuple(count for _, count, _, _ in prompts),
            self.block_table[:, :requests],
        )

    def prepare_batch_update(self) -> tuple[list[FutureRequestState], list[int], None]:
        return self.requests_in_batch, self.new_tokens, None

    def reset(self) -> None:
        super().reset()
        if self._host is not None:
            self._host.reset()

    def _get_graph_key(self) -> tuple[int, ...]:
        return (*super()._get_graph_key(), int(self.mixed))
