"""The embedded engine: transformers' continuous batching over a base and its experts."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.banks import Banks, bank_layout
from meswitch_cli.engine.base_model import BaseModel, load_base, model_dtype
from meswitch_cli.engine.between_steps import BetweenSteps
from meswitch_cli.engine.contract import (
    BASE,
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
from meswitch_cli.engine.expert import ExpertOpener, ServedModel, open_base
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.grammar import Grammars
from meswitch_cli.engine.hidden import HiddenStates
from meswitch_cli.engine.loader import Loader
from meswitch_cli.engine.requests import check_request
from meswitch_cli.engine.residency import HostCopies, Load, SlotTable
from meswitch_cli.engine.sampler import Sampler
from meswitch_cli.engine.settings import EngineSettings, check_name
from meswitch_cli.engine.version import check_transformers
from meswitch_cli.errors import MeswitchError

if TYPE_CHECKING:
    from meswitch_cli.engine.batching import Manager, Processor

logger = logging.getLogger(__name__)

MAX_MODEL_LEN = 8192
#: How long `stop` waits for the loop to take notice.
STOP_SECONDS = 30.0


class TransformersEngine:
    """Implements `contract.Engine`.

    Attributes:
        failed: experts that could not be served at the start, and why.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Read the base's headers; nothing is loaded yet.

        Raises:
            EngineError: transformers is of a version that the engine does not know.
            CheckpointError: there is no such base.
        """
        check_transformers()
        self.settings = settings
        self.failed: dict[str, str] = {}
        self._checkpoint = Checkpoint.open(settings.base)
        self.base_id = self._checkpoint.source.id
        longest = int(self._checkpoint.config.get("max_position_embeddings") or MAX_MODEL_LEN)
        self.max_model_len = settings.max_model_len or min(longest, MAX_MODEL_LEN)
        self._opener = ExpertOpener(self._checkpoint)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._random = random.Random(settings.seed)
        self._grammars = Grammars()
        self._active: dict[str, Generation] = {}
        self._cancelled: set[str] = set()
        self._between_steps = BetweenSteps(self._wake, lambda: self._closed_for_good)
        self._closed: str | None = "the engine has not been started"
        self._prompt_tokens = self._generated_tokens = 0
        self._base: BaseModel | None = None
        self._manager: Manager | None = None

    def start(self) -> None:
        """As the contract says.

        Raises:
            EngineError: the base, or (when `strict`, or none is left) an expert cannot be served.
        """
        from meswitch_cli.engine.batching import make_manager

        if self._manager is not None:
            raise EngineError("the engine has been started already")
        settings = self.settings
        device, dtype = settings.torch_device, model_dtype(self._checkpoint, settings.dtype)
        if settings.dtype == "auto" and device.type == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # the CPU's kernels know no float16
        self._base = base = load_base(self._checkpoint, device, dtype)
        models = [open_base(self._checkpoint, base.vocabulary), *self._open_experts(base)]
        experts = [model for model in models if model.artifact]
        slots = settings.slots or max(1, len(settings.experts))
        layout = bank_layout(base, [model.artifact.manifest for model in experts if model.artifact])
        host_bytes = settings.host_bytes if settings.host_bytes is not None else 0 if device.type == "cpu" else None
        banks = Banks(base, layout, slots)
        banks.install()
        self._copies = HostCopies(host_bytes)
        self._loader = Loader(banks, self._copies, self._on_loaded)
        self._hidden = HiddenStates(base)
        self._table = SlotTable(slots, settings.max_running, settings.max_wait)
        for model in models:
            self._table.add(model)
        with torch.no_grad():
            for index, model in enumerate(experts[:slots]):
                self._fill(model, index)
        self._manager = make_manager(base, settings, slots, self.max_model_len, self)
        self._loader.start()
        self._manager.start()
        self._closed = None

    def submit(self, request: GenerationRequest, on_chunk: OnChunk) -> None:
        with self._lock:
            self._refuse_if_closed()
            model = self._model(request.expert)
        check_request(request, model, self.max_model_len)
        grammar = self._grammars.grammar(request.sampling, model)
        with self._lock:
            self._refuse_if_closed()
            if self._model(request.expert) is not model:
                raise UnknownExpertError(f"no expert {request.expert!r} is served any more")
            if request.id in self._active:
                raise InvalidRequestError(f"id {request.id!r} is in use by a request that runs", "id")
            if len(self._active) >= self.settings.max_running + self.settings.max_queue:
                raise QueueFullError(f"{len(self._active)} requests run or wait; try again later")
            seed = request.sampling.seed if request.sampling.seed is not None else self._random.getrandbits(62)
            generation = Generation(request, model, Sampler(request, model, seed, grammar), on_chunk)
            self._active[request.id] = generation
            self._table.enqueue(generation)
            self._prompt_tokens += len(request.prompt_tokens)
        self._wake()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._active:
                self._cancelled.add(request_id)
        self._wake()

    def tokenizer(self, expert: str) -> Tokenizer:
        with self._lock:
            return self._model(expert).tokenizer

    def experts(self) -> tuple[ExpertStatus, ...]:
        with self._lock:
            if self._base is None:
                return ()
            copies = {name for name, item in self._table.experts.items() if item.model.identity in self._copies}
            return tuple(
                ExpertStatus(
                    name=name,
                    path=item.model.path,
                    artifact=item.model.identity,
                    nbytes=item.model.nbytes,
                    residency=self._table.residency(item, copies),
                    slot=item.slot,
                    pinned=item.pinned,
                    running=item.running,
                    waiting=len(item.waiting),
                )
                for name, item in self._table.experts.items()
                if name != BASE
            )

    def load_expert(self, name: str, path: Path) -> None:
        check_name(name)
        with self._lock:
            self._refuse_if_closed()
            if name in self._table.experts:
                raise EngineError(f"expert {name!r} is served already; unload it first")
        model = self._opener.open(name, Path(path))
        self._between_steps.run(lambda processor: self._admit_expert(model, processor))

    def unload_expert(self, name: str) -> None:
        with self._changed:
            self._refuse_if_closed()
            item = self._table.experts[self._model(name).name]
            if name == BASE:
                raise EngineError("the base cannot be unloaded")
            item.leaving = True
            self._changed.wait_for(lambda: self._closed_for_good or not self._table.is_busy(item))
        self._between_steps.run(lambda processor: self._drop_expert(name, processor))

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

    def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
        if self._base is None:
            raise ShuttingDownError("the engine has not been started")
        return self._hidden.pooled(token_ids, layer)

    def statistics(self) -> EngineStatistics:
        with self._lock:
            if self._manager is None:
                raise ShuttingDownError("the engine has not been started")
            processor = self._manager.batch_processor
            return EngineStatistics(
                running=self._table.running,
                waiting=self._table.waiting,
                slots=len(self._table.slots),
                slots_used=self._table.slots_used,
                slot_hits=self._table.hits,
                slot_loads=self._table.loads,
                slot_evictions=self._table.evictions,
                slot_load_seconds=self._loader.seconds,
                slot_load_bytes=self._loader.nbytes,
                cache_blocks=processor.cache.num_blocks if processor else 0,
                cache_blocks_used=processor.blocks_used if processor else 0,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
            )

    def drain(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._closed = self._closed or "the engine is shutting down"
            return self._changed.wait_for(lambda: not self._active, timeout)

    def stop(self) -> None:
        manager = self._manager
        if manager is None:
            return
        with self._lock:
            self._closed = self._closed or "the engine is shutting down"
            self._cancelled.update(self._active)
        self._wake()
        if manager.is_running():
            with self._changed:
                self._changed.wait_for(lambda: not self._active, STOP_SECONDS)
            manager.stop(block=True, hard_stop=True)
        self._loader.stop()
        with self._lock:
            self._manager = self._base = None
            self._table = SlotTable(1, 1, 0)
            self._closed = "the engine has been stopped"

    # What the loop calls, in its own thread.

    def before_step(self, processor: Processor) -> None:
        self._between_steps.do(processor)
        for generation in self._take_cancelled():
            generation.end("cancelled")
            if not self._withdraw(generation):
                processor.cancel(generation.id)
                self.on_end(generation)
        with self._changed:
            hopeless = self._table.hopeless()
            for generation in hopeless:
                self._active.pop(generation.id, None)
            self._changed.notify_all()
        for generation in hopeless:
            generation.end("error", f"expert {generation.model.name!r} finds no slot: others are pinned in all of them")
        with self._lock:
            for load in self._table.loads_to_start():
                self._loader.load(load, self._table.experts[load.expert].model)
            for name in self._table.prefetches():
                self._loader.prefetch(self._table.experts[name].model)
            admitted = self._table.admissions()
        for generation in admitted:
            generation.queued_seconds = time.monotonic() - generation.since
            processor.admit(generation)

    def on_end(self, generation: Generation) -> None:
        with self._changed:
            if self._active.pop(generation.id, None) is None:
                return
            self._cancelled.discard(generation.id)
            self._generated_tokens += len(generation.sampler.generated)
            self._table.release(generation)
            self._changed.notify_all()

    def on_failure(self, generation: Generation, error: Exception) -> None:
        generation.end("error", str(error))
        self.on_end(generation)

    def on_stop(self, error: Exception | None) -> None:
        """The loop has ended: by `stop`, or by an error that leaves nothing to go on with."""
        with self._changed:
            self._closed = f"the engine has failed: {error}" if error else "the engine has been stopped"
            left = list(self._active.values())
            self._active.clear()
            self._changed.notify_all()
        for generation in left:
            generation.end("error" if error else "cancelled", str(error) if error else None)

    def _on_loaded(self, load: Load, problem: str | None) -> None:
        with self._changed:
            if problem is None:
                self._table.loaded(load)
            else:
                logger.error("expert %s: %s", load.expert, problem)
                for generation in self._table.load_failed(load):
                    self._active.pop(generation.id, None)
                    generation.end("error", problem)
            self._changed.notify_all()
        self._wake()

    # Parts of the above.

    @property
    def _closed_for_good(self) -> bool:
        return self._manager is None or not self._manager.is_running()

    def _open_experts(self, base: BaseModel) -> list[ServedModel]:
        models = []
        for name, path in self.settings.experts.items():
            try:
                model = self._opener.open(name, Path(path))
                if model.artifact:
                    bank_layout(base, [model.artifact.manifest])
                models.append(model)
            except MeswitchError as error:
                if self.settings.strict:
                    raise
                self.failed[name] = str(error)
        if self.failed and not models:
            raise EngineError("no expert can be served: " + "; ".join(self.failed.values()))
        return models

    def _fill(self, model: ServedModel, slot: int) -> None:
        """Put an expert into an empty slot before the loop begins."""
        load = self._table.assign(model.name, slot)
        with self._loader.lock:
            self._loader.copy(model, load.slot)
        self._table.loaded(load)

    def _admit_expert(self, model: ServedModel, processor: Processor) -> None:
        with self._lock:
            if model.name in self._table.experts:
                raise EngineError(f"expert {model.name!r} is served already; unload it first")
            resident = [item for item in self._table.experts.values() if item.slot is not None]
            served = [item.model.artifact for item in self._table.experts.values()]
            everyone = [artifact.manifest for artifact in (*served, model.artifact) if artifact is not None]
        if not self._loader.has_room(everyone):
            if processor.model_runner.pad_inputs:
                raise EngineError(
                    f"expert {model.name!r} needs more room than the slots have, and captured graphs cannot follow "
                    "them elsewhere: start the engine with it"
                )
            self._loader.make_room(everyone, {item.slot: item.model for item in resident if item.slot is not None})
        with self._lock:
            self._table.add(model)

    def _drop_expert(self, name: str, processor: Processor) -> None:
        with self._lock:
            item = self._table.experts[name]
            slot = self._table.remove(name)
            self._copies.forget(item.model.identity)
            self._grammars.forget(item.model)
        if slot is not None:
            self._loader.clear(slot)
        processor.cache.evict_cached_blocks()

    def _take_cancelled(self) -> list[Generation]:
        with self._lock:
            taken = [self._active[request_id] for request_id in self._cancelled if request_id in self._active]
            self._cancelled.clear()
            return taken

    def _withdraw(self, generation: Generation) -> bool:
        with self._changed:
            if not self._table.withdraw(generation):
                return False
            self._active.pop(generation.id, None)
            self._changed.notify_all()
            return True

    def _model(self, name: str) -> ServedModel:
        item = self._table.experts.get(name) if self._base is not None else None
        if item is None or item.leaving:
            raise UnknownExpertError(f"no expert {name!r} is served")
        return item.model

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ShuttingDownError(self._closed)

    def _wake(self) -> None:
        if self._manager is not None:
            self._manager.wake()
