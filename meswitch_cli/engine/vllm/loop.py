"""vLLM's own engine, stepped by one thread: what goes into it, and what comes out."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm import EngineArgs, SamplingParams
from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.llm_engine import LLMEngine

from meswitch_cli.engine.banks import Layout
from meswitch_cli.engine.contract import TokenLogprob
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.vllm.names import worker_config


@dataclass(eq=False)
class PooledPrompt:
    """A prompt whose hidden states after a layer are wanted, and their mean `[hidden]` when it is known."""

    tokens: tuple[int, ...]
    layer: int
    mean: list[float] | None = None
    done: threading.Event = field(default_factory=threading.Event)


class VllmLoop:
    """Used by one thread alone, as vLLM's engine asks for.

    Attributes:
        blocks: of the cache, and those that running requests hold; for any thread to read, as is `loads`.
        loads: seconds and bytes of all copies into slots.
    """

    def __init__(self, arguments: dict[str, Any], layers_prefix: str, on_end: Callable[[Generation], None]) -> None:
        """Load the base. `on_end` is told of each request that ended by itself."""
        try:
            self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        except BaseException:
            _leave_groups()
            raise
        self.blocks, self.loads = (0, 0), (0.0, 0)
        self._layers_prefix, self._on_end = layers_prefix, on_end
        self._generations: dict[str, Generation] = {}
        self._pooled: dict[str, PooledPrompt] = {}
        self._count_blocks()

    @property
    def busy(self) -> bool:
        return bool(self._generations or self._pooled)

    def begin(self, generation: Generation, params: SamplingParams, adapter: LoRARequest | None) -> None:
        """Have a request computed from the next batch on.

        Raises:
            ValueError: vLLM refuses it.
        """
        prompt = tokens_input(list(generation.request.prompt_tokens))
        self.engine.add_request(generation.id, prompt, params, lora_request=adapter)
        self._generations[generation.id] = generation

    def abort(self, generation: Generation) -> None:
        """Compute a request no further, and free its blocks."""
        self.engine.abort_request([generation.id])
        self._generations.pop(generation.id, None)
        self._count_blocks()

    def pool(self, prompts: Sequence[PooledPrompt]) -> None:
        """Submit prompts that vLLM must compute whole: their states are wanted, so no cached ones will do."""
        params = SamplingParams(
            temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=True
        )
        for prompt in prompts:
            name = f"pooled-{uuid.uuid4().hex}"
            self.engine.collective_rpc("meswitch_watch", args=(name, self._layers_prefix, prompt.layer))
            self.engine.add_request(name, tokens_input(list(prompt.tokens)), params)
            self._pooled[name] = prompt

    def compute_batch(self) -> None:
        """Compute one batch, and tell what came out."""
        outputs = self.engine.step()
        self._count_blocks()
        for output in outputs:
            generation, prompt = self._generations.get(output.request_id), self._pooled.get(output.request_id)
            if generation is not None:
                self._tell(generation, output)
            elif prompt is not None and output.finished:
                del self._pooled[output.request_id]
                # Each worker of a pipeline has some of the layers, and so one the states.
                means = self.engine.collective_rpc("meswitch_take_mean", args=(output.request_id,))
                prompt.mean = next(filter(None, means), None)
                prompt.done.set()

    def load(self, adapter: LoRARequest) -> None:
        """Put an expert into a slot, in place of the one used least recently where none is free.

        Raises:
            ArtifactError: it cannot be read.
        """
        self.engine.add_lora(adapter)
        self.loads = self.engine.collective_rpc("meswitch_loads")[0]

    def pin(self, adapter: LoRARequest, pinned: bool) -> None:
        """Have vLLM keep an expert that is in a slot, or let it go."""
        if pinned:
            self.engine.pin_lora(adapter.lora_int_id)
        else:
            self.engine.collective_rpc("meswitch_unpin", args=(adapter.lora_int_id,))

    def remove(self, adapter: LoRARequest) -> None:
        self.engine.remove_lora(adapter.lora_int_id)

    def grow(self, layout: Layout) -> None:
        """Make the slots large enough for a layout."""
        self.engine.collective_rpc("meswitch_grow", args=(worker_config(layout),))

    def shutdown(self) -> None:
        self.engine.engine_core.shutdown()
        _leave_groups()

    def _tell(self, generation: Generation, output: Any) -> None:
        (completion,) = output.outputs
        generation.cached_tokens = output.num_cached_tokens or 0
        logprobs = completion.logprobs or [None] * len(completion.token_ids)
        for token, reported in zip(completion.token_ids, logprobs, strict=True):
            logprob = None if reported is None else _logprob(token, reported, generation.request.sampling.logprobs)
            if generation.accept(token, logprob):
                break
        if output.finished and not generation.finished:
            generation.end("error", f"vLLM ended the request: {completion.finish_reason}")
        if generation.finished:
            if output.finished:
                del self._generations[generation.id]
            else:
                self.abort(generation)
            self._on_end(generation)

    def _count_blocks(self) -> None:
        pool = self.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        blocks = pool.num_gpu_blocks - 1  # one stands for none
        self.blocks = (blocks, blocks - pool.get_num_free_blocks())


def _leave_groups() -> None:
    """Leave vLLM's groups of processes, so that another engine may be made here."""
    destroy_model_parallel()
    destroy_distributed_environment()


def _logprob(token: int, reported: Any, wanted: int | None) -> TokenLogprob:
    """vLLM reports the chosen token and the likeliest ones in one mapping."""
    best = sorted(reported.items(), key=lambda item: item[1].rank)[: wanted or 0]
    top = tuple((other, float(value.logprob)) for other, value in best)
    return TokenLogprob(token, float(reported[token].logprob), top)
