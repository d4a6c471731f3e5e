"""vLLM's own engine, in its own processes: what goes into it, and what comes out."""

from __future__ import annotations

import asyncio
import itertools
import queue
import re
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any, TypeVar

from vllm import AsyncEngineArgs, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from meswitch_cli.engine.contract import EngineError, TokenLogprob
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.vllm.cache_use import CacheUse

Result = TypeVar("Result")
#: How often to look whether vLLM's processes live, where one of them is asked something; in seconds.
ANSWER_SECONDS = 1.0


class VllmLoop:
    """`AsyncLLM` in a thread with an event loop of its own.

    One other thread submits, aborts and takes what has arrived, so that a generation is one thread's alone. The rest
    may be called by any.

    Attributes:
        loads: seconds and bytes of all copies into slots.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        layers_prefix: str,
        on_end: Callable[[Generation], None],
        on_failure: Callable[[Generation, Exception], None],
        on_arrival: Callable[[], None],
    ) -> None:
        """Load the base. `on_end` is told of each request that ended by itself, `on_failure` of each that vLLM refuses,
        `on_arrival`, in another thread, of whatever there is to be taken."""
        self._layers_prefix = layers_prefix
        self._on_end, self._on_failure, self._on_arrival = on_end, on_failure, on_arrival
        self.loads = (0.0, 0)
        #: By a name of their own for vLLM: an id may be used again while what is left of the one before arrives.
        self._generations: dict[str, Generation] = {}
        self._names: dict[str, str] = {}
        self._numbers = itertools.count()
        self._arrived: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._cache = CacheUse()
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="meswitch-vllm-events", daemon=True)
        self._thread.start()
        self.engine: Any = None
        try:
            self.engine = self._do(self._make(arguments))
        except BaseException:
            self._end_events()
            raise

    @property
    def blocks(self) -> tuple[int, int]:
        """Of the cache, and those that running requests hold."""
        return self._cache.blocks(bool(self._generations))

    @property
    def failure(self) -> str | None:
        """Why vLLM computes no more."""
        dead = self.engine is not None and self.engine.errored
        return "vLLM's processes have ended; their log says why" if dead else None

    def begin(self, generation: Generation, params: SamplingParams, adapter: LoRARequest | None) -> None:
        """Have a request computed from the next batch on."""
        name = self._names[generation.id] = str(next(self._numbers))
        self._generations[name] = generation
        prompt = tokens_input(list(generation.request.prompt_tokens))
        self._start(self._follow(name, prompt, params, adapter))

    def abort(self, generation: Generation) -> None:
        """Compute a request no further, and free its blocks."""
        self._start(self.engine.abort(self._forget(generation)))

    def take(self) -> None:
        """Tell what has come out of vLLM.

        Raises:
            EngineError: vLLM computes no more.
        """
        while not self._arrived.empty():
            name, arrived = self._arrived.get_nowait()
            if isinstance(arrived, EngineDeadError):
                break
            generation = self._generations.get(name)
            if generation is None:  # aborted since
                continue
            if isinstance(arrived, Exception):
                self._forget(generation)
                self._on_failure(generation, arrived)
            else:
                self._tell(generation, arrived)
        if self.failure is not None:
            raise EngineError(self.failure)

    def pool(self, prompts: Sequence[Sequence[int]], layer: int) -> list[list[float]]:
        """Mean hidden states of prompts after a layer; empty where vLLM has shown none.

        Raises:
            EngineError: vLLM computes no more.
        """

        async def all_of_them() -> list[list[float]]:
            return list(await asyncio.gather(*(self._pool(tokens, layer) for tokens in prompts)))

        return self._do(all_of_them())

    def load(self, adapter: LoRARequest, pinned: bool, on_done: Callable[[str | None], None]) -> Future[None]:
        """Put an expert into a slot, in place of the one used least recently where none is free; return at once.

        `on_done` is told, in another thread, what went wrong.
        """

        async def loaded() -> None:
            await self.engine.add_lora(adapter)
            self.loads = tuple((await self.engine.collective_rpc("meswitch_loads"))[0])
            await self._pin(adapter, pinned)

        def done(future: Future[None]) -> None:
            problem = None if future.cancelled() else future.exception()
            if future.cancelled() or problem is not None:
                on_done(self.failure or ("vLLM is shutting down" if problem is None else _own_words(problem)))
            else:
                on_done(None)

        started = self._start(loaded())
        started.add_done_callback(done)
        return started

    def pin(self, adapter: LoRARequest, pinned: bool) -> None:
        """Have vLLM keep an expert that is in a slot, or let it go."""
        self._do(self._pin(adapter, pinned))

    def remove(self, adapter: LoRARequest) -> None:
        self._do(self.engine.remove_lora(adapter.lora_int_id))

    def take_in(self, path: Path) -> None:
        """Make slots large enough for an artifact.

        Raises:
            EngineError: they cannot be made larger.
        """
        self._do(self.engine.collective_rpc("meswitch_take_in", args=(str(path),)))

    def shutdown(self) -> None:
        """End vLLM's processes."""
        self.engine.shutdown()
        self._end_events()

    async def _make(self, arguments: dict[str, Any]) -> AsyncLLM:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[self._cache.logger])
        await engine.get_supported_tasks()  # asked before the first request: one could be aborted meanwhile
        return engine

    async def _follow(self, name: str, prompt: Any, params: SamplingParams, adapter: LoRARequest | None) -> None:
        try:
            async for output in self.engine.generate(prompt, params, name, lora_request=adapter):
                self._arrived.put((name, output))
                self._on_arrival()
        except Exception as error:
            self._arrived.put((name, error.__cause__ if isinstance(error, EngineGenerateError) else error))
            self._on_arrival()

    async def _pool(self, tokens: Sequence[int], layer: int) -> list[float]:
        """Submit a prompt that vLLM must compute whole: its states are wanted, so no cached ones will do."""
        name = f"pooled-{uuid.uuid4().hex}"
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            detokenize=False,
            ignore_eos=True,
            skip_reading_prefix_cache=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        await self.engine.collective_rpc("meswitch_watch", args=(name, self._layers_prefix, layer))
        try:
            # The first of several replicas of the base is the one whose workers' answers are returned.
            prompt = tokens_input(list(tokens))
            async for _ in self.engine.generate(prompt, params, name, data_parallel_rank=self._first):
                pass
        finally:
            # Each worker of a pipeline has some of the layers, and so one the states.
            means = await self.engine.collective_rpc("meswitch_take_mean", args=(name,))
        return next(filter(None, means), [])

    @property
    def _first(self) -> int | None:
        return 0 if self.engine.vllm_config.parallel_config.data_parallel_size > 1 else None

    async def _pin(self, adapter: LoRARequest, pinned: bool) -> None:
        if pinned:
            await self.engine.pin_lora(adapter.lora_int_id)
        else:
            await self.engine.collective_rpc("meswitch_unpin", args=(adapter.lora_int_id,))

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
                self._forget(generation)
            else:
                self.abort(generation)
            self._on_end(generation)

    def _forget(self, generation: Generation) -> str:
        name = self._names.pop(generation.id)
        del self._generations[name]
        return name

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._events)

    def _do(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = self._start(work)
        while not wait([future], ANSWER_SECONDS).done:
            if self.failure is not None:  # what a process was asked that has died is never answered
                future.cancel()
        try:
            return future.result()
        except (EngineDeadError, CancelledError) as error:
            raise EngineError(self.failure or "vLLM is shutting down") from error
        except Exception as error:
            raise EngineError(_own_words(error)) from error

    def _end_events(self) -> None:
        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            if others:  # one may still ask a process that has died
                await asyncio.wait(others, timeout=ANSWER_SECONDS)

        self._start(end()).result()
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join()
        self._events.close()


def _own_words(error: BaseException) -> str:
    """What went wrong in a worker, without what each process on the way has put around it."""
    text = str(error)
    found = re.search(r"Worker failed with error '(.*)', please check", text, re.DOTALL)
    return found[1] if found else re.sub(r"^Call to \w+ method failed: ", "", text)


def _logprob(token: int, reported: Any, wanted: int | None) -> TokenLogprob:
    """vLLM reports the chosen token and the likeliest ones in one mapping."""
    best = sorted(reported.items(), key=lambda item: item[1].rank)[: wanted or 0]
    top = tuple((other, float(value.logprob)) for other, value in best)
    return TokenLogprob(token, float(reported[token].logprob), top)
