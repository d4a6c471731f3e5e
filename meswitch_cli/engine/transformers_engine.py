"""The embedded engine: transformers' continuous batching over a base and its experts, or its plain forward pass."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Collection, Sequence

import torch

from meswitch_cli.engine.bank_layout import device_layout
from meswitch_cli.engine.banks import Banks
from meswitch_cli.engine.base_model import BaseModel, load_base, served_dtype
from meswitch_cli.engine.contract import EngineError, EngineStatistics, GenerationRequest, ShuttingDownError
from meswitch_cli.engine.expert import ServedModel, open_base
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.grammar import Grammars
from meswitch_cli.engine.hidden import HiddenStateReader
from meswitch_cli.engine.host_copies import HostCopies
from meswitch_cli.engine.loader import SlotLoader
from meswitch_cli.engine.loop import Loop, LoopThread
from meswitch_cli.engine.one_by_one import OneByOne
from meswitch_cli.engine.plain_layers import load_plain_base
from meswitch_cli.engine.proof import why_one_by_one
from meswitch_cli.engine.residency import Load, SlotTable
from meswitch_cli.engine.sampler import Sampler
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.slotted_engine import SlottedEngine
from meswitch_cli.engine.version import check_transformers

logger = logging.getLogger(__name__)


class TransformersEngine(SlottedEngine[Loop]):
    """Implements `contract.Engine`.

    Attributes:
        one_by_one: why requests are computed one at a time; None where they are in batches.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Read the base's headers; nothing is loaded yet.

        Raises:
            EngineError: transformers is of a version that the engine does not know, or several devices are asked for.
            CheckpointError: there is no such base.
        """
        check_transformers()
        if settings.tensor_parallel * settings.pipeline_parallel * settings.data_parallel > 1:
            raise EngineError("one model over several devices needs --engine vllm")
        super().__init__(settings)
        self.one_by_one: str | None = None
        self._grammars = Grammars()
        self._base: BaseModel | None = None
        self._thread: LoopThread | None = None

    def start(self) -> None:
        """As the contract says.

        Raises:
            EngineError: the base, or (when `strict`, or none is left) an expert cannot be served.
        """
        from meswitch_cli.engine.batching import make_manager

        if self._thread is not None:
            raise EngineError("the engine has been started already")
        settings = self.settings
        dtype = served_dtype(self._checkpoint, settings)
        where, device = str(self._checkpoint.source.path), settings.torch_device
        self.one_by_one = why_one_by_one(self._checkpoint.config, where, device, dtype)
        if self.one_by_one is not None:
            logger.warning("%s: requests are computed one at a time, not in batches: %s", where, self.one_by_one)
        self._base = base = (load_plain_base if self.one_by_one else load_base)(self._checkpoint, device, dtype)
        opened = self._open_experts(lambda model: model.artifact and device_layout(base, [model.artifact.manifest]))
        models = [open_base(self._checkpoint, base.vocabulary), *opened]
        experts = [model for model in models if model.artifact]
        slots = settings.slots or max(1, len(settings.experts))
        manifests = [model.artifact.manifest for model in experts if model.artifact]
        banks = Banks(base, device_layout(base, manifests), slots)
        banks.install()
        self._copies = HostCopies(settings.copies_nbytes, self._checkpoint)
        self._loader = SlotLoader(banks, self._copies, self._on_loaded)
        self._hidden = HiddenStateReader(base)
        self._table = SlotTable(slots, settings.max_running, settings.max_wait)
        for model in models:
            self._table.add(model)
        with torch.no_grad():
            for index, model in enumerate(experts[:slots]):
                self._fill(model, index)
        if self.one_by_one is None:
            self._thread = make_manager(base, settings, slots, self.max_model_len, self)
        else:
            self._thread = OneByOne(base, settings, slots, self.max_model_len, self)
        self._loader.start()
        self._thread.start()
        self._closed = None
        atexit.register(self.stop)  # the loop must not compute while Python tears its modules down

    @property
    def num_layers(self) -> int:
        if self._base is None:
            raise ShuttingDownError("the engine has not been started")
        return self._base.architecture.num_layers

    def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
        if self._base is None:
            raise ShuttingDownError("the engine has not been started")
        return self._hidden.pooled(token_ids, layer)

    def statistics(self) -> EngineStatistics:
        with self._lock:
            if self._thread is None:
                raise ShuttingDownError("the engine has not been started")
            blocks, used = self._thread.cache_use()
            return self._statistics(
                load_seconds=self._loader.seconds,
                load_bytes=self._loader.nbytes,
                cache_blocks=blocks,
                cache_blocks_used=used,
            )

    def stop(self) -> None:
        thread = self._thread
        if thread is None:
            return
        atexit.unregister(self.stop)
        self._cancel_all()
        thread.end()
        self._loader.stop()
        with self._lock:
            self._thread = self._base = None
            self._table = SlotTable(1, 1, 0)
            self._closed = "the engine has been stopped"

    def _continuation(self, request: GenerationRequest, model: ServedModel) -> Sampler:
        grammar = self._grammars.grammar(request.sampling, model)
        with self._lock:
            seed = request.sampling.seed if request.sampling.seed is not None else self._random.getrandbits(62)
        return Sampler(request, model, seed, grammar)

    def _begin(self, loop: Loop, generation: Generation) -> None:
        loop.admit(generation)

    def _abort(self, loop: Loop, generation: Generation) -> None:
        loop.cancel(generation.id)

    def _start_load(self, loop: Loop, load: Load, model: ServedModel) -> None:
        self._loader.load(load, model)

    def _prefetch(self, model: ServedModel) -> None:
        self._loader.prefetch(model)

    def _fill(self, model: ServedModel, slot: int) -> None:
        """Put an expert into an empty slot before the loop begins."""
        load = self._table.assign(model.name, slot)
        with self._loader.lock:
            self._loader.copy(model, load.slot)
        self._table.finish_load(load)

    def _admit_expert(self, loop: Loop, model: ServedModel) -> None:
        with self._lock:
            self._refuse_if_served(model.name)
            resident = [item for item in self._table.experts.values() if item.slot is not None]
            served = [item.model.artifact for item in self._table.experts.values()]
            everyone = [artifact.manifest for artifact in (*served, model.artifact) if artifact is not None]
        if not self._loader.has_room(everyone):
            self._loader.make_room(everyone, {item.slot: item.model for item in resident if item.slot is not None})
            loop.banks_moved()
        with self._lock:
            self._table.add(model)

    def _drop_expert(self, loop: Loop, name: str) -> None:
        with self._lock:
            item = self._table.experts[name]
            slot = self._table.remove(name)
            self._copies.forget(item.model.digest)
            self._grammars.forget(item.model)
        if slot is not None:
            self._loader.clear(slot)
        loop.forget_prefixes()

    def _on_host(self) -> Collection[str]:
        if self._base is None:
            return ()
        return {name for name, item in self._table.experts.items() if item.model.digest in self._copies}

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_running()

    def _wake(self) -> None:
        if self._thread is not None:
            self._thread.wake()
