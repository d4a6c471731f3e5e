"""transformers' continuous batching with our scheduler, runner and cache keys, and a hook before every batch.

The scheduler, the paged cache, the batch tensors and the loop are transformers' own. What is overridden was read in
transformers 5.23 and 5.24; `version.py` refuses others.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.initialization import update_cb_config_after_cache_creation
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.logits_process import LogitsProcessorList

from meswitch_cli.engine.base_model import BaseModel
from meswitch_cli.engine.batch import CurrentBatch
from meswitch_cli.engine.compiling import compile_products
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.inputs import BatchInputs
from meswitch_cli.engine.loop import Hooks
from meswitch_cli.engine.memory import cache_pages
from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.prefix import SaltedCache
from meswitch_cli.engine.runner import Runner
from meswitch_cli.engine.scheduling import GenerationState, SlotOrderScheduler
from meswitch_cli.engine.settings import EngineSettings
from meswitch_kernels.dispatch import default_backend


class Processor(continuous_api.ContinuousBatchProcessor):  # type: ignore[misc]
    """`loop.Loop`: one batch after the other."""

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
        shares = generation.request.sampling.prompt_logprobs is None
        self.cache.admit(generation.id, generation.model.digest, shares)
        state = GenerationState.of(generation, list(generation.request.prompt_tokens), self.model_runner.waits)
        self.scheduler.add_waiting_request(state)

    def cancel(self, request_id: str) -> None:
        self.scheduler.set_request_cancellation(request_id)
        for state in self.scheduler.clear_cancelled_requests():
            self.offloading_manager.free_request_cpu_cache(state)
        self.scheduler.block_new_requests = False
        self.cache.forget(request_id)
        self.blocks_used = self.cache.count_blocks_used()

    def banks_moved(self) -> None:
        """Graphs hold addresses."""
        self.model_runner.forget_graphs()

    def forget_prefixes(self) -> None:
        self.cache.evict_cached_blocks()

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
    """The processor's thread: `loop.LoopThread`."""

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

    def start(self) -> None:
        """As transformers starts it, but as a daemon: a program that never calls `stop` would wait for it for ever."""
        self.background_thread_status.clear()
        self._generation_thread = threading.Thread(
            target=self._run_generation_loop, name="meswitch-batches", daemon=True
        )
        self._generation_thread.start()

    def wake(self) -> None:
        self._wake_up_loop.set()

    def end(self) -> None:
        if self.is_running():
            self.stop(block=True, hard_stop=True)

    def cache_use(self) -> tuple[int, int]:
        processor: Processor | None = self.batch_processor
        return (processor.cache.num_blocks, processor.blocks_used) if processor else (0, 0)

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
        loop = super()._run_generation_loop
        # Since 5.24 it enters the mode that it is told; before, whoever called it had entered one.
        told = {name: True for name in inspect.signature(loop).parameters if name == "use_inference_mode"}
        try:
            with torch.inference_mode():
                loop(**told)
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
