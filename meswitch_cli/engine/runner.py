"""transformers' runner of a batch, with experts in it and our sampler after it."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import CudaGraphBuffer, stream_context

from meswitch_cli.engine import attention
from meswitch_cli.engine.batch import Batch, CurrentBatch
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.prompt_scores import ScoredRun, keep_scores, places, scored_runs
from meswitch_cli.engine.sampler import Sampler, choose
from meswitch_cli.engine.scheduling import GenerationState

logger = logging.getLogger(__name__)

#: Prompts of fewer tokens are read by kernels that larger ones have compiled.
WARM_UP_TOKENS = 16


class Runner(ModelRunner):  # type: ignore[misc]
    """Runs the model, under a graph where there is one, and then our sampler, which never is under it.

    Graphs are of batches whose requests have one token each; a batch with a prompt in it is not worth one.

    Attributes:
        slot_of_token: `[max_batch_tokens]` int32, filled before every batch; at one place, so that a graph may read it.
    """

    def __init__(self, current: CurrentBatch, slots: int, **options: Any) -> None:
        super().__init__(**options)
        self.use_cuda_graph_decode: bool
        self._current, self._slots = current, slots
        self._backend = kernels(self.inputs_and_outputs.device, self.cache.dtype)
        self._logits: dict[tuple[int, ...] | None, torch.Tensor] = {}
        io = self.inputs_and_outputs
        self.slot_of_token = torch.full((self.cache.max_batch_tokens,), -1, dtype=torch.int32, device=io.device)
        self._host_slots = torch.full((self.cache.max_batch_tokens,), -1, dtype=torch.int32)
        if io.device.type == "cuda":
            self._host_slots = self._host_slots.pin_memory()
        self._runs: list[tuple[int, int]] = []
        self.samples = True
        self._scored: list[ScoredRun] = []
        #: Whether the thread waits for a device that computes, and may do something else meanwhile.
        self.waits = io.device.type != "cpu"
        self.untold: list[Generation] = []

    @property
    def mixed(self) -> bool:
        """Whether the batch has tokens of an expert."""
        return bool(self.inputs_and_outputs.mixed)

    @mixed.setter
    def mixed(self, mixed: bool) -> None:
        self.inputs_and_outputs.mixed = mixed

    def maybe_pad_inputs(self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        self.pad_inputs = self.use_cuda_graph_decode and use_decode_fast_path
        padded: tuple[int, int] = super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)
        return padded

    def set_slots(self, batch: list[FutureRequestState]) -> None:
        """Note the slot of every token of the batch. A batch of the base alone has plain layers."""
        runs = [(item.state.generation.slot, item.query_length) for item in batch]
        padding = self.inputs_and_outputs.num_q_tokens - sum(length for _, length in runs)
        self._runs = [*runs, (-1, padding)]
        slots = [slot for slot, length in self._runs for _ in range(length)]
        self.mixed = max(slots, default=-1) >= 0
        self._host_slots[: len(slots)] = torch.tensor(slots, dtype=torch.int32)
        with stream_context(self.inputs_and_outputs.compute_stream):
            self.slot_of_token[: len(slots)].copy_(self._host_slots[: len(slots)], non_blocking=True)

    def warm_up(self, model: nn.Module, slot: int) -> None:
        """Have the kernels for prompts compiled, of each size for which they differ, and capture a graph of each number
        of requests: of the base alone and with the expert in `slot`."""
        if not self.use_cuda_graph_decode:
            return
        self.samples = False
        gc.collect()
        gc.freeze()  # every capture collects garbage, and would look at all that has been imported
        prompts, requests = [self.cache.max_batch_tokens], [self.cb_config.max_requests_per_batch]
        while prompts[-1] >= 2 * WARM_UP_TOKENS:
            prompts.append(prompts[-1] // 2)
        while requests[-1] > 1:
            requests.append(1 << (requests[-1] - 1).bit_length() - 1)
        try:
            for tokens, used in itertools.product(prompts, (slot, -1)):
                self._try(model, used, [tokens])
            for count, used in itertools.product(requests, (slot, -1)):
                self._try(model, used, [1] * count)
                if self.inputs_and_outputs.get_graph() is None:  # the reason has been logged
                    logger.warning("no graph of %d requests could be captured: the engine does without", count)
                    self.use_cuda_graph_decode = False
                    break
        finally:
            gc.unfreeze()
            self.samples = True
            self.cache.reset()

    def _try(self, model: nn.Module, slot: int, lengths: list[int]) -> None:
        """Compute a made-up batch of requests of so many new tokens."""
        tokens = self.inputs_and_outputs.num_q_tokens = sum(lengths)
        generation: Any = SimpleNamespace(generation=SimpleNamespace(slot=slot))
        self.set_slots([FutureRequestState(generation, True, {}, length) for length in lengths])
        self.run_one_warmup(model, num_q_tokens=tokens, max_kv_read=0 if len(lengths) < tokens else None)

    def forget_graphs(self) -> None:
        """Have every graph captured again when it is needed: the layers read from other memory now."""
        self.inputs_and_outputs.graphs = CudaGraphBuffer()
        self._logits.clear()

    def _capture_graph(self, forward: Callable[..., None], stream: Any, *arguments: Any) -> None:
        super()._capture_graph(forward, stream, *arguments)
        # A capture computes nothing, and what the forward pass before it computed lies elsewhere.
        with stream_context(stream):
            self.inputs_and_outputs.get_graph().replay()

    def _forward_process_and_sample(
        self,
        model: nn.Module,
        batch_data: dict[str, Any],
        carry_over_ids: torch.Tensor,
        prev_output_ids: torch.Tensor,
        output_ids: torch.Tensor,
    ) -> None:
        io = self.inputs_and_outputs
        slots = self.slot_of_token[: batch_data["input_ids"].shape[1]]
        batch_data = dict(batch_data)
        indices = batch_data["logits_indices"]
        if io.use_block_table:  # every token is a row, in their order; the sampler finds those that it needs
            batch_data.pop("logits_to_keep", None)
            indices = None
        if self._scored and indices is not None:
            more = torch.tensor(places(self._scored), dtype=indices.dtype, device=indices.device)
            indices = torch.cat([indices, more])
            if "logits_to_keep" in batch_data:
                batch_data["logits_to_keep"] = indices
        if self.mixed:
            rows = slots if indices is None else slots[indices.long()]
            runs = None if io.use_block_table else self._runs  # a graph is replayed with other slots
            self._current.batch = Batch(slots, rows, self._slots, self._backend, runs)
        # Not the cache: since transformers 5.24 a model's own layers would write to it, before our attention does.
        given = {name: value for name, value in batch_data.items() if name != "cache"}
        try:
            with attention.attending(batch_data, io.layout):
                logits: torch.Tensor = model(**given).logits
        finally:
            self._current.batch = None
        if indices is not None and "logits_to_keep" not in batch_data:
            logits = logits[:, indices, :]
        self._logits[self._key()] = logits[0]

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        io = self.inputs_and_outputs
        self._scored = scored_runs(io.requests_in_batch) if self.samples else []
        super().compute_batch(model, batch_data)
        if not self.samples:
            return
        self.tell()
        key = self._key()
        with stream_context(io.compute_stream):
            logits = self._logits[key] if key else self._logits.pop(None)
            if scored := places(self._scored):
                keep_scores(self._scored, logits[scored] if io.use_block_table else logits[-len(scored) :])
            rows = [row for row, item in enumerate(io.requests_in_batch) if item.has_new_token]
            states = [io.requests_in_batch[row].state for row in rows]
            if io.use_block_table and len(rows) < len(io.requests_in_batch):
                logits = logits[rows]
            io.new_tokens = self._chosen(logits[: len(rows)], states) if rows else []

    def tell(self) -> None:
        """Tell what the last batch's tokens complete."""
        untold, self.untold = self.untold, []
        for generation in untold:
            generation.tell()

    @staticmethod
    def _chosen(logits: torch.Tensor, states: list[GenerationState]) -> list[int]:
        """The next token of each request, -1 where none has a finite score."""
        samplers = [cast(Sampler, state.generation.sampler) for state in states]
        chosen = choose(logits.to(torch.float32, copy=True), samplers)
        for state, choice in zip(states, chosen, strict=True):
            state.chosen = choice.logprob
        return [-1 if choice.token is None else choice.token for choice in chosen]

    def _key(self) -> tuple[int, ...] | None:
        """The graph that the logits belong to: each keeps its own, and a replay writes them again."""
        io = self.inputs_and_outputs
        return io._get_graph_key() if self.use_cuda_graph_decode and io.use_block_table else None
