"""The tensors of a batch, as transformers fills them: in host memory first where the device is another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import TMP_TOKEN_ID, FutureRequestState
from transformers.generation.continuous_batching.utils import stream_context

from meswitch_cli.engine.prefix import SaltedCache


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


class HostInputs(ContinuousBatchingIOs):  # type: ignore[misc]
    """The tensors of a batch in host memory, with a way of its own for single tokens: transformers' would look at every
    page of every request again, and make a tensor for each."""

    def __init__(self, cache: SaltedCache, **options: Any) -> None:
        super().__init__(cache=cache, **options)
        self._rows = self._bulk_input_tensor.numpy()
        self._tables = self.block_table.numpy()
        #: What each row of the tables was filled with: a request's own list of blocks, how many, and of what edition.
        self._filled: list[tuple[Any, int, int] | None] = [None] * self.block_table.shape[1]

    def forget_tables(self) -> None:
        """Fill all rows anew next time: something else has written to them."""
        self._filled = [None] * len(self._filled)

    def prepare_single_tokens(self, batch: list[FutureRequestState], num_q_tokens: int) -> None:
        """As `prepare_batch_tensors`, of requests with one new token each: ids, positions and tables, which is all that
        such a batch's layers read, padded to `num_q_tokens`."""
        count = len(batch)
        self.use_block_table, self.num_q_tokens, self.max_kv_read = True, num_q_tokens, 0
        self.num_request_in_batch, self.requests_in_batch = count, list(batch)
        self.total_seqlen_q, self.max_length_q = count, 1
        tokens, places = [0] * num_q_tokens, [0] * num_q_tokens
        for row, item in enumerate(batch):
            state = item.state
            tokens[row], places[row] = state.tokens_to_process[0], state.position_offset
            state.position_offset += 1
            if item.has_new_token:
                state.tokens_to_process = [TMP_TOKEN_ID]
            self._fill(row, state.request_id)
        for row in range(count, num_q_tokens):
            if self._filled[row] is not _NOBODY:
                self._tables[:, row, 0] = -1
                self._filled[row] = _NOBODY
        self._rows[0, :num_q_tokens], self._rows[1, :num_q_tokens] = tokens, places

    def _fill(self, row: int, request_id: str) -> None:
        allocators = self.cache.cache_allocators.values()
        first = next(iter(allocators)).block_table[request_id]
        total = sum(len(allocator.block_table[request_id]) for allocator in allocators)
        filled, edition = self._filled[row], self.cache.edition
        if filled is not None and filled[0] is first and filled[1:] == (total, edition):
            return
        for allocator in allocators:
            blocks = allocator.block_table[request_id]
            stride = allocator.block_physical_stride // allocator.tokens_per_page
            self._tables[allocator.index, row, : len(blocks)] = [block * stride for block in blocks]
        self._filled[row] = (first, total, edition)


#: In place of what a row was filled with: that of a request that is none.
_NOBODY: tuple[Any, int, int] = (None, 0, -1)


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
            self._host = HostInputs(**(options | {"device": torch.device("cpu")}))
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
        if use_decode_fast_path:
            host.prepare_single_tokens(requests_in_batch, num_q_tokens)
        else:  # pages are read, and no listed rows
            host.prepare_batch_tensors(requests_in_batch, *options, 0, use_padding)
        self.requests_in_batch = host.requests_in_batch
        host._transfer_inputs(self, self.compute_stream, non_blocking=True)
        self.layout = None if host.use_block_table else self._copied_layout()

    def _copied_layout(self) -> BatchLayout:
        host, place = self._host, 0
        host.forget_tables()
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
            self._host.forget_tables()

    def _get_graph_key(self) -> tuple[int, ...]:
        return (*super()._get_graph_key(), int(self.mixed))
