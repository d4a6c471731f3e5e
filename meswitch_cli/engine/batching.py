"""transformers' continuous batching with our sampler, our cache keys, and a hook before every batch.

The scheduler, the paged cache, the batch tensors and the loop are transformers' own. What is overridden was read in
transformers 5.23; `version.py` refuses others.
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import FIFOScheduler
from transformers.generation.continuous_batching.utils import CudaGraphBuffer, stream_context
from transformers.generation.logits_process import LogitsProcessorList

from meswitch_cli.engine import attention
from meswitch_cli.engine.base_model import BaseModel
from meswitch_cli.engine.batch import Batch, CurrentBatch
from meswitch_cli.engine.compiling import compile_products
from meswitch_cli.engine.contract import EngineError, TokenLogprob
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.inputs import BatchInputs
from meswitch_cli.engine.memory import cache_pages
from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.prefix import SaltedCache
from meswitch_cli.engine.prompt_scores import ScoredRun, keep_scores, places, scored_runs
from meswitch_cli.engine.sampler import Sampler, choose
from meswitch_cli.engine.settings import EngineSettings
from meswitch_kernels.dispatch import default_backend

logger = logging.getLogger(__name__)


#: Prompts of fewer tokens are read by kernels that larger ones have compiled.
WARM_UP_TOKENS = 16


class Hooks(Protocol):
    """What the loop tells the engine, always from its own thread."""

    def before_batch(self, processor: Processor) -> None: ...
    def on_end(self, generation: Generation) -> None: ...
    def on_failure(self, generation: Generation, error: Exception) -> None: ...
    def on_stop(self, error: Exception | None) -> None: ...


class GenerationState(RequestState):  # type: ignore[misc]
    """A request as transformers schedules it, whose end our `Generation` decides."""

    generation: Generation
    chosen: TokenLogprob | None = None
    #: Whether what a token completes is told while the device computes the next batch.
    tells_later = False

    @classmethod
    def of(cls, generation: Generation, tokens: list[int], tells_later: bool) -> GenerationState:
        state = cls(request_id=generation.id, initial_tokens=tokens, max_new_tokens=None)
        state.generation, state.tells_later = generation, tells_later
        return state

    def update_and_check_completion(self, token_id: int, logprob: float | None) -> bool:
        if self.status != RequestStatus.DECODING:  # type: ignore[has-type]
            return False
        self.generated_tokens.append(token_id)
        self.tokens_to_process = [token_id]
        if token_id < 0:
            self.generation.end("error", "the model gave no token a finite score")
            over = True
        else:
            over = self.generation.accept(token_id, self.chosen, self.tells_later)
        if over:
            self.status = RequestStatus.FINISHED
        return over

    def create_equivalent_initial_request(self) -> GenerationState:
        """Begin again with what was generated as prompt: how transformers makes room in a full cache."""
        tokens = self.initial_tokens + self.generated_tokens
        return GenerationState.of(self.generation, tokens, self.tells_later)


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
        try:
            with attention.attending(batch_data, io.layout):
                logits: torch.Tensor = model(**batch_data).logits
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


class SlotOrderScheduler(FIFOScheduler):  # type: ignore[misc]
    """transformers' first in, first out, but that requests of one expert are taken together.

    An expert whose prompts are read costs a merge of its weights in every batch, however many prompts there are, so
    those who wait for the same slot as the one who has waited longest go with it. The one who has waited longest
    goes first in any case. Within a batch tokens of a slot lie together: their product reads and writes in place.
    """

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, bool, int, int]:
        batch = self._continued(token_budget)
        if batch is not None:
            return batch, True, len(batch), 0
        batch, *rest = super().schedule_batch(token_budget, cache_budget)
        if batch:
            batch.sort(key=_slot_of)
        return (batch, *rest)

    def _continued(self, token_budget: int) -> list[FutureRequestState] | None:
        """The next token of every request, where nothing waits and all have room; what transformers would schedule too,
        after looking at each request anew. None where it has to."""
        states = self.active_requests.values()
        if self.waiting_requests or not 0 < len(states) <= min(token_budget, self.max_requests_per_batch):
            return None
        longest, page = self.cache.max_decode_fast_path_length, self.cache.smallest_page
        batch = []
        for state in states:
            place = state.position_offset
            if state.status != RequestStatus.DECODING or place >= longest or len(state.tokens_to_process) != 1:
                return None
            complete: dict[str, int] = {}
            if place % page in (0, page - 1):  # it begins a page, or ends one
                if not self.cache.can_store_request_tokens(state, 1):
                    return None
                complete = self.cache.count_new_complete_blocks(state, 1)
            batch.append(FutureRequestState(state, not state.remaining_prefill_tokens, complete, 1))
        self.starved_requests: list[tuple[RequestState, int]] = []
        return sorted(batch, key=_slot_of)

    def _get_waiting_candidates(self) -> list[GenerationState]:
        waiting: list[GenerationState] = super()._get_waiting_candidates()
        turns: dict[int, int] = {}
        for state in waiting:
            turns.setdefault(state.generation.slot, len(turns))
        return sorted(waiting, key=lambda state: turns[state.generation.slot])


def _slot_of(item: FutureRequestState) -> int:
    slot: int = item.state.generation.slot
    return slot


class Processor(continuous_api.ContinuousBatchProcessor):  # type: ignore[misc]
    """One batch after the other; `before_batch` runs before each, in the engine's thread, `on_end` for each request
    that ended by itself."""

    def __init__(self, *, current: CurrentBatch, slots: int, hooks: Hooks, warm_slot: int, **options: Any) -> None:
        super().__init__(**options)
        self._hooks, self._warm_slot = hooks, warm_slot
        #: Blocks that running requests hold, for any thread to read.
        self.blocks_used = 0
        self.inputs_and_outputs = BatchInputs(
            staged=self.cache.max_blocks_per_request > 0,
            cache=self.cache,
            config=self.config,
            continuous_batching_config=self.cb_config,
            device=self.model_device,
            model_dtype=self.model_dtype,
            logit_processor=self.logit_processor,
        )
        self.offloading_manager._compute_stream = self.inputs_and_outputs.compute_stream
        self.model_runner = Runner(
            current,
            slots,
            logit_processor=self.logit_processor,
            cb_config=self.cb_config,
            cache=self.cache,
            inputs_and_outputs=self.inputs_and_outputs,
            do_sample=False,
            return_logprobs=False,
        )

    def __del__(self) -> None:
        self.__dict__.pop("inputs_and_outputs", None)  # graphs go first; `Manager.stop` collects the rest, once

    def warmup(self, model: nn.Module) -> None:
        self.model_runner.warm_up(model, self._warm_slot)

    def admit(self, generation: Generation) -> None:
        """Hand a request to the scheduler."""
        shares = generation.request.sampling.prompt_logprobs is None
        self.cache.admit(generation.id, generation.model.digest, shares)
        state = GenerationState.of(generation, list(generation.request.prompt_tokens), self.model_runner.waits)
        self.scheduler.add_waiting_request(state)

    def cancel(self, request_id: str) -> None:
        """Take a request out of the scheduler and free its blocks."""
        self.scheduler.set_request_cancellation(request_id)
        for state in self.scheduler.clear_cancelled_requests():
            self.offloading_manager.free_request_cpu_cache(state)
        self.scheduler.block_new_requests = False
        self.cache.forget(request_id)
        self.blocks_used = self.cache.count_blocks_used()

    def prepare_next_batch(self) -> bool:
        self._hooks.before_batch(self)
        ready: bool = super().prepare_next_batch()
        if ready:
            self.model_runner.set_slots(self.inputs_and_outputs.requests_in_batch)
        else:
            self.model_runner.tell()
        return ready

    def update_batch(self) -> None:
        generations = [item.state.generation for item in self.inputs_and_outputs.requests_in_batch]
        for generation in generations:
            generation.cached_tokens = self.cache.matched.get(generation.id, 0)
        super().update_batch()
        self.model_runner.untold = generations
        self.blocks_used = self.cache.count_blocks_used()
        for generation in generations:
            if generation.finished:
                self.cache.forget(generation.id)
                self._hooks.on_end(generation)


class OutputSink:
    """Takes the place of transformers' queue of outputs: chunks are told as they arise, failures are told here."""

    def __init__(self, on_failure: Callable[[Generation, Exception], None]) -> None:
        self._on_failure = on_failure

    def deliver(self, output: Any) -> None:
        """Nothing waits for it."""

    def deliver_batch(self, outputs: list[Any]) -> None:
        """Nothing waits for them."""

    def fail_and_deliver(self, state: GenerationState, error: Exception) -> None:
        state.status = RequestStatus.FAILED
        self._on_failure(state.generation, error)


class Manager(continuous_api.ContinuousBatchingManager):  # type: ignore[misc]
    """The loop and its thread."""

    def __init__(
        self,
        model: Any,
        config: ContinuousBatchingConfig,
        current: CurrentBatch,
        slots: int,
        hooks: Hooks,
        *,
        pages: int,
        warm_slot: int,
    ) -> None:
        """`pages`: the most that a request has, 0 for lists of rows. `warm_slot`: whose expert made-up batches are
        computed with."""
        super().__init__(model, GenerationConfig(do_sample=False, eos_token_id=-1), config)
        self.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList())
        self.output_router = OutputSink(hooks.on_failure)
        self._current, self._slots, self._hooks, self._warm_slot = current, slots, hooks, warm_slot
        # As resolved, there are graphs and tables for a flash kernel alone.
        graphs = captures_graphs(model.device)
        self.continuous_batching_config.use_cuda_graph = (False, graphs)
        self.continuous_batching_config.max_blocks_per_request = pages

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """The model has our attention. transformers would look for a flash kernel, and fetch one from the Hub."""

    def wake(self) -> None:
        """Have the loop look for work now."""
        self._wake_up_loop.set()

    def _create_batch_processor(self) -> Processor:
        made: Processor | None = self.batch_processor
        if made is not None:
            made.reset()
            return made
        config, model = self.continuous_batching_config, self.model
        cache = SaltedCache(
            paged=config.max_blocks_per_request > 0,
            config=model.config.get_text_config(),
            continuous_batching_config=config,
            device=model.device,
            distributed_helper=self.distributed_helper,
            dtype=model.dtype,
            model_supports_logits_to_keep=model._supports_logits_to_keep(),
        )
        update_cb_config_after_cache_creation(config, cache.num_blocks, cache.max_batch_tokens)
        return Processor(
            current=self._current,
            slots=self._slots,
            hooks=self._hooks,
            warm_slot=self._warm_slot,
            cache=cache,
            config=model.config.get_text_config(),
            generation_config=self.generation_config,
            continuous_batching_config=config,
            logit_processor=self.logit_processor,
            input_queue=self.input_queue,
            cancel_queue=self.cancel_queue,
            output_router=self.output_router,
            background_thread_status=self.background_thread_status,
            model_device=model.device,
            model_dtype=model.dtype,
            scheduler=SlotOrderScheduler(cache, config.safety_margin, config.max_requests_per_batch),
            distributed_helper=self.distributed_helper,
        )

    def _run_generation_loop(self) -> None:
        try:
            with torch.inference_mode():
                super()._run_generation_loop()
        finally:
            self._hooks.on_stop(self.background_thread_status.fatal_error)


def captures_graphs(device: torch.device) -> bool:
    """Whether a batch's launches follow from its size alone, and repeating them saves time."""
    return device.type == "cuda" and default_backend(device.type) == "triton"


def make_manager(
    base: BaseModel,
    settings: EngineSettings,
    slots: int,
    max_model_len: int,
    hooks: Hooks,
    warm_slot: int = 0,
    paged: bool | None = None,
) -> Manager:
    """Make the cache and the loop, and capture graphs where there are any, with the expert in `warm_slot`.

    `paged` is whether attention reads pages, where they are, or rows that are listed; None chooses by device.

    Raises:
        EngineError: the cache does not fit.
    """
    page_size = settings.page_size or (64 if base.device.type == "cuda" else 32)
    config = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=cache_pages(base, settings.cache_tokens, page_size, max_model_len),
        max_batch_tokens=settings.max_batch_tokens,
        max_requests_per_batch=settings.max_running,
        allow_block_sharing=settings.prefix_sharing,
        use_async_batching=False,
        auto_switch_to_flash=False,
    )
    try:
        if base.device.type == "cuda":
            compile_products([*base.linears.values(), base.head], kernels(base.device, base.dtype), slots)
            torch.cuda.synchronize(base.device)  # batches are computed on a stream that does not wait for the others
        # A request that is tried before the first fills a batch alone.
        pages = -(-max(max_model_len, settings.max_batch_tokens) // page_size)
        if not (captures_graphs(base.device) if paged is None else paged):
            pages = 0
        manager = Manager(base.model, config, base.current, slots, hooks, pages=pages, warm_slot=warm_slot)
        manager.warmup()
    except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
        raise EngineError(f"the cache cannot be made: {error}; fewer slots or cache tokens would help") from error
    return manager
