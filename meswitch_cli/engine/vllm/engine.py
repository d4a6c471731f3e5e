"""vLLM, in its own processes, over a base and its experts."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.engine.bank_layout import bank_layout
from meswitch_cli.engine.base_model import served_dtype
from meswitch_cli.engine.contract import EngineError, EngineStatistics, GenerationRequest, ShuttingDownError
from meswitch_cli.engine.expert import ServedModel, open_base
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.grammar import Grammar, Grammars
from meswitch_cli.engine.hidden import check_prompts
from meswitch_cli.engine.residency import Load, SlotTable
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.slotted_engine import STOP_SECONDS, SlottedEngine
from meswitch_cli.engine.vllm.arguments import engine_arguments, set_environment
from meswitch_cli.engine.vllm.names import base_names
from meswitch_cli.engine.vllm.parent import told_by_children
from meswitch_cli.engine.vllm.sampling import sampling_params
from meswitch_cli.engine.vllm.version import check_vllm
from meswitch_cli.model.architecture import architecture

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from meswitch_cli.engine.vllm.loop import VllmLoop


#: How often to look at who waits for a slot, where nothing arrives; in seconds.
TABLE_SECONDS = 0.05
#: How often to look whether vLLM's processes live, where nothing arrives; in seconds.
HEALTH_SECONDS = 1.0


class FollowedTokens:
    """What vLLM has chosen for a request: `generation.Continuation`."""

    def __init__(self, params: Any, grammar: Grammar | None) -> None:
        self.params, self._grammar = params, grammar
        self.generated: list[int] = []

    @property
    def complete(self) -> bool:
        return self._grammar is not None and self._grammar.complete

    def take(self, token: int) -> None:
        self.generated.append(token)
        if self._grammar is not None:
            self._grammar.take(token)


class VllmEngine(SlottedEngine["VllmLoop"]):
    """Implements `contract.Engine`.

    Which expert gets a slot, and when, is decided by our table before vLLM sees a request: its own scheduler lets
    requests of other experts wait for as long as those in slots keep coming.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Read the base's headers; nothing is loaded yet.

        Raises:
            EngineError: vLLM is missing, or of a version that the engine does not know.
            CheckpointError: there is no such base.
        """
        set_environment()
        check_vllm()
        super().__init__(settings)
        self._grammars = Grammars()
        self._adapters: dict[str, LoRARequest] = {}
        self._numbers = itertools.count(1)
        self._work = threading.Event()
        self._stopping = False
        self._loop: VllmLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """As the contract says.

        Raises:
            EngineError: the base, or (when `strict`, or none is left) an expert cannot be served.
        """
        if self._thread is not None:
            raise EngineError("the engine has been started already")
        from meswitch_cli.engine.vllm.loop import VllmLoop
        from meswitch_cli.engine.vllm.plugin import register

        register()
        settings = self.settings
        self._described = architecture(self._checkpoint.config, str(self._checkpoint.source.path))
        self._names = names = base_names(self._described)
        opened = self._open_experts(lambda model: model.artifact and bank_layout(names, [model.artifact.manifest]))
        layout = bank_layout(names, [model.artifact.manifest for model in opened if model.artifact])
        self._added_rows = max((_added_rows(model.artifact.manifest) for model in opened if model.artifact), default=0)
        slots = settings.slots or max(1, len(settings.experts))
        arguments = engine_arguments(
            settings,
            self._checkpoint,
            self._described,
            names,
            layout,
            slots=slots,
            dtype=served_dtype(self._checkpoint, settings),
            max_model_len=self.max_model_len,
            seed=self._random.getrandbits(31),
        )
        self._table = SlotTable(slots, settings.max_running, settings.max_wait)
        for model in [open_base(self._checkpoint, names.vocabulary), *opened]:
            self._add(model)
        make = partial(VllmLoop, arguments, self._described.layers_prefix, self.on_end, self.on_failure, self._work.set)
        ready = threading.Event()
        problems: list[BaseException] = []
        self._thread = threading.Thread(
            target=self._run, args=(make, opened[:slots], ready, problems), name="meswitch-vllm", daemon=True
        )
        with told_by_children() as refusal:
            self._thread.start()
            ready.wait()
            reason = refusal.reason
        if problems:
            self._thread = None
            raise EngineError(
                f"vLLM cannot serve {self._checkpoint.source.path}: {reason or problems[0]}"
            ) from problems[0]
        self._closed = None

    @property
    def num_layers(self) -> int:
        if self._thread is None:
            raise ShuttingDownError("the engine has not been started")
        return int(self._described.num_layers)

    def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
        loop = self._loop
        if loop is None:
            raise ShuttingDownError("the engine has not been started")
        check_prompts(token_ids, layer, self._described.num_layers, self._names.vocabulary)
        longest = max(map(len, token_ids), default=0)
        if longest >= self.max_model_len:
            raise EngineError(f"a prompt of {longest} tokens; the most is {self.max_model_len - 1}")
        means = loop.pool(token_ids, layer)
        if not all(means):
            raise EngineError("vLLM has shown no hidden states of a prompt")
        width = int(self._described.parameters[f"{self._names.embedding_name}.weight"].shape[1])
        return torch.tensor(means).reshape(len(means), width)

    def statistics(self) -> EngineStatistics:
        with self._lock:
            loop = self._loop
            if loop is None:
                raise ShuttingDownError("the engine has not been started")
            return self._statistics(
                load_seconds=loop.loads[0],
                load_bytes=loop.loads[1],
                cache_blocks=loop.blocks[0],
                cache_blocks_used=loop.blocks[1],
            )

    def pin_expert(self, name: str, pinned: bool = True) -> None:
        super().pin_expert(name, pinned)
        self._in_loop(lambda loop: loop.pin(self._adapters[name], self._is_pinned(name)))

    def stop(self) -> None:
        thread = self._thread
        if thread is None:
            return
        self._cancel_all()
        self._stopping = True
        self._wake()
        thread.join(STOP_SECONDS)
        with self._lock:
            self._thread = self._loop = None
            self._table = SlotTable(1, 1, 0)
            self._closed = "the engine has been stopped"

    def _run(
        self,
        make: Callable[[], VllmLoop],
        resident: Sequence[ServedModel],
        ready: threading.Event,
        problems: list[BaseException],
    ) -> None:
        """The thread that decides what vLLM computes, and tells what it has computed."""
        failure: BaseException | None = None
        loop: VllmLoop | None = None
        try:
            loop = self._loop = make()
            loads = [
                self._load(loop, self._table.assign(model.name, slot), model) for slot, model in enumerate(resident)
            ]
            wait(loads)
            ready.set()
            while not self._stopping:
                self._advance(loop)
        except BaseException as error:
            failure = error
            if not ready.is_set():
                problems.append(error)
        finally:
            if loop is not None:
                loop.shutdown()
            self.on_stop(failure)
            ready.set()

    def _advance(self, loop: VllmLoop) -> None:
        """Tell what has arrived, and admit; then wait for more."""
        self._work.clear()
        loop.take()
        self.before_batch(loop)
        self._work.wait(TABLE_SECONDS if self._table.waiting else HEALTH_SECONDS)

    def _continuation(self, request: GenerationRequest, model: ServedModel) -> FollowedTokens:
        grammar = self._grammars.grammar(request.sampling, model)
        return FollowedTokens(sampling_params(request.sampling, model), grammar)

    def _begin(self, loop: VllmLoop, generation: Generation) -> None:
        followed = generation.sampler
        assert isinstance(followed, FollowedTokens)
        loop.begin(generation, followed.params, self._adapters.get(generation.model.name))

    def _abort(self, loop: VllmLoop, generation: Generation) -> None:
        loop.abort(generation)

    def _start_load(self, loop: VllmLoop, load: Load, model: ServedModel) -> None:
        """Have vLLM fill a slot, between two of its batches; the others' tokens are told meanwhile."""
        self._load(loop, load, model)

    def _load(self, loop: VllmLoop, load: Load, model: ServedModel) -> Future[None]:
        def loaded(problem: str | None) -> None:
            self._on_loaded(load, None if problem is None else f"expert {model.name!r} cannot be loaded: {problem}")

        return loop.load(self._adapters[model.name], self._is_pinned(model.name), loaded)

    def _prefetch(self, model: ServedModel) -> None:
        """Nothing: vLLM reads an adapter when it puts it into a slot."""

    def _is_pinned(self, name: str) -> bool:
        """Whether vLLM must keep an expert in its slot."""
        with self._lock:
            item = self._table.experts[name]
            return item.slot is not None and item.pinned

    def _admit_expert(self, loop: VllmLoop, model: ServedModel) -> None:
        with self._lock:
            self._refuse_if_served(model.name)
        if model.artifact is not None:
            added = _added_rows(model.artifact.manifest)
            if added > self._added_rows:
                raise EngineError(
                    f"expert {model.name!r} has {added} tokens of its own, vLLM was started with room for "
                    f"{self._added_rows}: start the engine with it"
                )
            loop.take_in(model.path)
        self._add(model)

    def _drop_expert(self, loop: VllmLoop, name: str) -> None:
        with self._lock:
            model = self._table.experts[name].model
            self._table.remove(name)
            self._grammars.forget(model)
        loop.remove(self._adapters.pop(name))

    def _add(self, model: ServedModel) -> None:
        """To the table, and to vLLM's adapters by a name that the cache's keys hold."""
        from vllm.lora.request import LoRARequest

        if model.artifact is not None:
            name = f"{model.name}@{model.digest}"
            self._adapters[model.name] = LoRARequest(name, next(self._numbers), str(model.path))
        with self._lock:
            self._table.add(model)

    def _on_host(self) -> Collection[str]:
        return ()

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _wake(self) -> None:
        self._work.set()


def _added_rows(manifest: Manifest) -> int:
    return max((entry.added_rows for entry in manifest.tensors), default=0)
