"""What every engine has in common: who is served, who waits for a slot, who has been told what."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.between_batches import BetweenBatches, Loop
from meswitch_cli.engine.contract import (
    BASE,
    Engine,
    EngineError,
    EngineStatistics,
    ExpertStatus,
    GenerationRequest,
    InvalidRequestError,
    OnChunk,
    QueueFullError,
    ShuttingDownError,
    Tokenizer,
    UnknownExpertError,
)
from meswitch_cli.engine.expert import ExpertOpener, ServedModel
from meswitch_cli.engine.generation import Continuation, Generation
from meswitch_cli.engine.requests import check_request
from meswitch_cli.engine.residency import Load, SlotTable
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.names import check_name

logger = logging.getLogger(__name__)

MAX_MODEL_LEN = 8192
#: How long `stop` waits for the loop to take notice.
STOP_SECONDS = 30.0
#: Experts opened at once when an engine starts; each reads and hashes files.
MOST_OPENED = 8


class SlottedEngine(Engine, ABC, Generic[Loop]):
    """Most of `contract.Engine`; what is left is a loop that calls `before_batch` and does as it is told there.

    Attributes:
        failed: experts that could not be served at the start, and why.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Read the base's headers; nothing is loaded yet.

        Raises:
            CheckpointError: there is no such base.
            UsageError: `max_model_len` is more than the base was made for.
        """
        self.settings = settings
        self.failed: dict[str, str] = {}
        self._checkpoint = Checkpoint.open(settings.base)
        for note in self._checkpoint.notes:
            logger.warning("%s", note)
        self.base_id = self._checkpoint.source.id
        longest = self._checkpoint.config.get("max_position_embeddings")
        if longest and settings.max_model_len and settings.max_model_len > longest:
            raise UsageError(
                f"max_model_len: {settings.max_model_len} is more than the {longest} positions of "
                f"{settings.base} (max_position_embeddings in its config.json)"
            )
        self.max_model_len = settings.max_model_len or min(int(longest or MAX_MODEL_LEN), MAX_MODEL_LEN)
        self.max_requests = settings.max_running + settings.max_queue
        self._opener = ExpertOpener(self._checkpoint)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._random = random.Random(settings.seed)
        self._active: dict[str, Generation] = {}
        self._cancelled: set[str] = set()
        self._between_batches: BetweenBatches[Loop] = BetweenBatches(self._wake, lambda: not self._running)
        self._closed: str | None = "the engine has not been started"
        self._prompt_tokens = self._generated_tokens = 0
        self._table = SlotTable(1, 1, 0)

    # What an engine brings, beside `start`, `stop`, `pooled_hidden_states` and `statistics`.

    @abstractmethod
    def _continuation(self, request: GenerationRequest, model: ServedModel) -> Continuation:
        """What chooses, or follows, a request's tokens. Raises InvalidRequestError."""

    @abstractmethod
    def _begin(self, loop: Loop, generation: Generation) -> None:
        """Have a request computed from the next batch on; its expert is in a slot."""

    @abstractmethod
    def _abort(self, loop: Loop, generation: Generation) -> None:
        """Compute a running request no further, and free its blocks."""

    @abstractmethod
    def _start_load(self, loop: Loop, load: Load, model: ServedModel) -> None:
        """Fill a slot, now or in another thread, and then call `_on_loaded`."""

    @abstractmethod
    def _prefetch(self, model: ServedModel) -> None:
        """An expert will be loaded soon."""

    @abstractmethod
    def _admit_expert(self, loop: Loop, model: ServedModel) -> None:
        """Make room for one more expert and add it to the table. Raises EngineError."""

    @abstractmethod
    def _drop_expert(self, loop: Loop, name: str) -> None:
        """Take an expert without requests out of the table and free its memory."""

    @abstractmethod
    def _on_host(self) -> Collection[str]:
        """Names of the experts that have a copy in host memory."""

    @abstractmethod
    def _wake(self) -> None:
        """Have the loop look for work now."""

    @property
    @abstractmethod
    def _running(self) -> bool:
        """Whether the loop runs."""

    # `contract.Engine`, as far as it is the same for all.

    @property
    def closed(self) -> str | None:
        return self._closed

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        with self._lock:
            self._refuse_if_closed()
            model = self._model(request.expert)
        check_request(request, model, self.max_model_len)
        continuation = self._continuation(request, model)
        with self._lock:
            self._refuse_if_closed()
            if self._model(request.expert) is not model:
                raise UnknownExpertError(f"no expert {request.expert!r} is served any more")
            if request.id in self._active:
                raise InvalidRequestError(f"id {request.id!r} is in use by a request that runs", "id")
            if len(self._active) >= self.max_requests:
                raise QueueFullError(f"{len(self._active)} requests run or wait; try again later")
            generation = Generation(request, model, continuation, on_chunk, self._forget)
            self._active[request.id] = generation
            self._table.enqueue(generation)
            self._prompt_tokens += len(request.prompt_tokens)
        self._wake()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            generation = self._active.get(request_id)
            if generation is None:
                return
            if not self._withdraw(generation):  # it runs; the loop takes it out between two batches
                self._cancelled.add(request_id)
                generation = None
        if generation is not None:
            generation.end("cancelled")
        self._wake()

    def tokenizer(self, expert: str) -> Tokenizer:
        with self._lock:
            return self._model(expert).tokenizer

    def sampling_defaults(self, expert: str) -> Mapping[str, float]:
        with self._lock:
            return self._model(expert).sampling

    def serves(self, expert: str) -> bool:
        with self._lock:
            item = self._table.experts.get(expert)
            return expert == BASE or (item is not None and not item.leaving)

    def digest(self, expert: str) -> str:
        with self._lock:
            return self._model(expert).digest

    def experts(self) -> tuple[ExpertStatus, ...]:
        with self._lock:
            copies = self._on_host()
            return tuple(
                ExpertStatus(
                    name=name,
                    path=item.model.path,
                    digest=item.model.digest,
                    nbytes=item.model.nbytes,
                    residency=self._table.residency(item, copies),
                    slot=item.slot,
                    pinned=item.pinned,
                    running=item.running,
                    waiting=len(item.waiting),
                )
                for name, item in self._table.experts.items()
                if name != BASE and not item.leaving
            )

    def load_expert(self, name: str, path: Path) -> None:
        check_name(name)
        with self._lock:
            self._refuse_if_closed()
            self._refuse_if_served(name)
        model = self._opener.open(name, Path(path))
        self._in_loop(lambda loop: self._admit_expert(loop, model))

    def unload_expert(self, name: str) -> None:
        with self._changed:
            self._refuse_if_closed()
            item = self._table.experts[self._model(name).name]
            if name == BASE:
                raise EngineError("the base cannot be unloaded")
            item.leaving = True
            self._changed.wait_for(lambda: not self._running or not self._table.is_busy(item))
        self._in_loop(lambda loop: self._drop_expert(loop, name))

    def pin_expert(self, name: str, pinned: bool = True) -> None:
        with self._lock:
            self._refuse_if_closed()
            item = self._table.experts[self._model(name).name]
            if name == BASE:
                raise EngineError("the base is always on the device")
            others = sum(other.pinned for other in self._table.experts.values() if other is not item)
            if pinned and others >= len(self._table.slots):
                raise EngineError(f"expert {name!r} cannot be pinned: every slot is pinned already")
            item.pinned = pinned
        self._wake()

    def drain(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._closed = self._closed or "the engine is shutting down"
            return self._changed.wait_for(lambda: self._is_idle, timeout)

    # What the loop calls, in its own thread.

    def before_batch(self, loop: Loop) -> None:
        self._between_batches.do(loop)
        with self._lock:
            cancelled = [self._active[request_id] for request_id in self._cancelled & self._active.keys()]
            self._cancelled.clear()
        for generation in cancelled:
            generation.end("cancelled")
            if not self._withdraw(generation):
                self._abort(loop, generation)
                self.on_end(generation)
        with self._changed:
            given_up = self._table.give_up()
        for generation in given_up:
            generation.end("error", f"expert {generation.model.name!r} finds no slot: others are pinned in all of them")
        with self._lock:
            loads = [(load, self._table.experts[load.expert].model) for load in self._table.start_loads()]
            waiting = [self._table.experts[name].model for name in self._table.prefetches()]
        for load, model in loads:
            self._start_load(loop, load, model)
        for model in waiting:
            self._prefetch(model)
        with self._lock:
            admitted = self._table.admit()
        for generation in admitted:
            generation.queued_seconds = time.monotonic() - generation.since
            self._begin(loop, generation)

    def on_end(self, generation: Generation) -> None:
        with self._changed:
            self._forget(generation)  # one whose caller raised was told of no end
            if self._table.release(generation):
                self._generated_tokens += len(generation.sampler.generated)
                self._changed.notify_all()

    def on_failure(self, generation: Generation, error: Exception) -> None:
        generation.end("error", str(error))
        self.on_end(generation)

    def on_stop(self, error: BaseException | None) -> None:
        """The loop has ended: by `stop`, or by an error that leaves nothing to go on with."""
        with self._changed:
            self._closed = f"the engine has failed: {error}" if error else "the engine has been stopped"
            left = list(self._active.values())
            self._active.clear()
            for generation in tuple(self._table.admitted):
                self._table.release(generation)
            self._changed.notify_all()
        for generation in left:
            generation.end("error" if error else "cancelled", str(error) if error else None)

    def _on_loaded(self, load: Load, problem: str | None) -> None:
        with self._changed:
            if problem is None:
                self._table.finish_load(load)
            else:
                logger.error("expert %s: %s", load.expert, problem)
                for generation in self._table.fail_load(load):
                    generation.end("error", problem)
            self._changed.notify_all()
        self._wake()

    # Parts of the above, and of starting and stopping.

    def _open_experts(self, check: Callable[[ServedModel], object]) -> list[ServedModel]:
        """Open the experts of the settings, several at a time, since hashing them takes most of a start; `check` raises
        for those that the base's layers cannot serve."""
        models, experts = [], self.settings.experts
        with ThreadPoolExecutor(max_workers=max(1, min(len(experts), os.cpu_count() or 1, MOST_OPENED))) as pool:
            opened = {name: pool.submit(self._opener.open, name, Path(path)) for name, path in experts.items()}
            for name, future in opened.items():
                try:
                    model = future.result()
                    check(model)
                    models.append(model)
                except MeswitchError as error:
                    if self.settings.strict:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                    self.failed[name] = str(error)
        if self.failed and not models:
            raise EngineError("no expert can be served: " + "; ".join(self.failed.values()))
        return models

    def _statistics(
        self, *, load_seconds: float, load_bytes: int, cache_blocks: int, cache_blocks_used: int
    ) -> EngineStatistics:
        """The engine's own figures, beside those that its loop knows."""
        return EngineStatistics(
            running=self._table.running,
            waiting=self._table.waiting,
            slots=len(self._table.slots),
            slots_used=self._table.slots_used,
            slot_hits=self._table.hits,
            slot_loads=self._table.loads,
            slot_evictions=self._table.evictions,
            slot_load_seconds=load_seconds,
            slot_load_bytes=load_bytes,
            cache_blocks=cache_blocks,
            cache_blocks_used=cache_blocks_used,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def _cancel_all(self) -> None:
        """Take no more requests, and have the loop end those that run or wait."""
        with self._changed:
            self._closed = self._closed or "the engine is shutting down"
            self._cancelled.update(self._active)
            self._wake()
            if self._running:
                self._changed.wait_for(lambda: self._is_idle, STOP_SECONDS)

    def _in_loop(self, work: Callable[[Loop], None]) -> None:
        """Run something between two batches; return when it is done, raise what it raises."""
        with self._lock:
            self._refuse_if_closed()
        self._between_batches.run(work)

    def _withdraw(self, generation: Generation) -> bool:
        with self._changed:
            withdrawn = self._table.withdraw(generation)
            if withdrawn:
                self._forget(generation)
            return withdrawn

    def _forget(self, generation: Generation) -> None:
        """Free a request's id and its place among the most that may run or wait. Who is told that it is over may submit
        another at once, so this comes before."""
        with self._changed:
            if self._active.get(generation.id) is generation:
                del self._active[generation.id]
                self._cancelled.discard(generation.id)
                self._changed.notify_all()

    @property
    def _is_idle(self) -> bool:
        """Whether no request runs or waits; the caller holds the lock."""
        return not self._active and not self._table.running

    def _model(self, name: str) -> ServedModel:
        item = self._table.experts.get(name)
        if item is None or item.leaving:
            raise UnknownExpertError(f"no expert {name!r} is served")
        return item.model

    def _refuse_if_served(self, name: str) -> None:
        if name in self._table.experts:
            raise EngineError(f"expert {name!r} is served already; unload it first")

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ShuttingDownError(self._closed)
