"""vLLM's engine over a base and its experts."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from meswitch_cli.checkpoint.architecture import architecture
from meswitch_cli.engine.banks import Layout, bank_layout
from meswitch_cli.engine.base_model import model_dtype
from meswitch_cli.engine.contract import (
    EngineError,
    EngineStatistics,
    GenerationRequest,
    ShuttingDownError,
    TokenLogprob,
)
from meswitch_cli.engine.expert import ServedModel, open_base
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.grammar import Grammar, Grammars
from meswitch_cli.engine.hidden import check_prompts
from meswitch_cli.engine.residency import Load, SlotTable
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.slotted_engine import STOP_SECONDS, SlottedEngine
from meswitch_cli.engine.vllm.arguments import engine_arguments, set_environment
from meswitch_cli.engine.vllm.names import base_names, worker_config
from meswitch_cli.engine.vllm.sampling import sampling_params
from meswitch_cli.engine.vllm.version import check_vllm
from meswitch_cli.errors import MeswitchError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

#: Loading the base's weights may take minutes; the loop's thread does it.
START_SECONDS = 3600.0


@dataclass(eq=False)
class _Probe:
    """A prompt whose hidden states are wanted, and their mean when it is known."""

    tokens: tuple[int, ...]
    layer: int
    mean: list[float] | None = None
    done: threading.Event = field(default_factory=threading.Event)


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


class VllmEngine(SlottedEngine["LLMEngine"]):
    """Implements `contract.Engine`.

    Every call into vLLM is made by one thread, the loop's, as vLLM's engine asks for. Which expert gets a slot, and
    when, is decided by our table before vLLM sees a request: its own scheduler lets requests of other experts wait
    for as long as those in slots keep coming.
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
        self._generations: dict[str, Generation] = {}
        self._work = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loads = (0.0, 0)
        self._blocks = (0, 0)
        self._probes: dict[str, _Probe] = {}

    def start(self) -> None:
        """As the contract says.

        Raises:
            EngineError: the base, or (when `strict`, or none is left) an expert cannot be served.
        """
        from meswitch_cli.engine.vllm.plugin import register

        if self._thread is not None:
            raise EngineError("the engine has been started already")
        register()
        settings = self.settings
        described = architecture(self._checkpoint.config, str(self._checkpoint.source.path))
        self._names = names = base_names(described)
        opened = self._open_experts(lambda model: model.artifact and bank_layout(names, [model.artifact.manifest]))
        self._described = described
        self._layout = bank_layout(names, [model.artifact.manifest for model in opened if model.artifact])
        slots = settings.slots or max(1, len(settings.experts))
        dtype = model_dtype(self._checkpoint, settings.dtype)
        if settings.dtype == "auto" and settings.torch_device.type == "cpu" and dtype == torch.float16:
            dtype = torch.float32  # the CPU's kernels know no float16
        arguments = engine_arguments(
            settings,
            self._checkpoint,
            described,
            names,
            self._layout,
            slots=slots,
            dtype=dtype,
            max_model_len=self.max_model_len,
            seed=self._random.getrandbits(31),
        )
        self._table = SlotTable(slots, settings.max_running, settings.max_wait)
        for model in [open_base(self._checkpoint, names.vocabulary), *opened]:
            self._add(model)
        ready: threading.Event = threading.Event()
        problems: list[BaseException] = []
        self._thread = threading.Thread(
            target=self._run, args=(arguments, opened[:slots], ready, problems), name="meswitch-vllm", daemon=True
        )
        self._thread.start()
        if not ready.wait(START_SECONDS) or problems:
            self._thread = None
            reason = str(problems[0]) if problems else "it takes too long"
            raise EngineError(f"vLLM cannot serve {self._checkpoint.source.path}: {reason}") from (
                problems[0] if problems else None
            )
        self._closed = None

    def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
        if self._thread is None:
            raise ShuttingDownError("the engine has not been started")
        check_prompts(token_ids, layer, self._described.num_layers)
        longest = max(map(len, token_ids), default=0)
        if longest >= self.max_model_len:
            raise EngineError(f"a prompt of {longest} tokens; the most is {self.max_model_len - 1}")
        probes = [_Probe(tuple(tokens), layer) for tokens in token_ids]
        self._in_loop(lambda loop: self._begin_probes(loop, probes))
        for probe in probes:
            while not probe.done.wait(0.1):
                if not self._running:
                    raise ShuttingDownError("the engine has stopped")
            if probe.mean is None:
                raise EngineError("vLLM has not computed the hidden states")
        width = int(self._described.parameters[f"{self._names.embedding_name}.weight"].shape[1])
        return torch.tensor([probe.mean for probe in probes]).reshape(len(probes), width)

    def statistics(self) -> EngineStatistics:
        with self._lock:
            if self._thread is None:
                raise ShuttingDownError("the engine has not been started")
            return EngineStatistics(
                running=self._table.running,
                waiting=self._table.waiting,
                slots=len(self._table.slots),
                slots_used=self._table.slots_used,
                slot_hits=self._table.hits,
                slot_loads=self._table.loads,
                slot_evictions=self._table.evictions,
                slot_load_seconds=self._loads[0],
                slot_load_bytes=self._loads[1],
                cache_blocks=self._blocks[0],
                cache_blocks_used=self._blocks[1],
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
            )

    def pin_expert(self, name: str, pinned: bool = True) -> None:
        super().pin_expert(name, pinned)
        self._in_loop(lambda loop: self._pin_in_vllm(loop, name))

    def stop(self) -> None:
        thread = self._thread
        if thread is None:
            return
        self._cancel_all()
        if thread.is_alive():
            with self._changed:
                self._changed.wait_for(lambda: not self._active, STOP_SECONDS)
        self._stopping = True
        self._wake()
        thread.join(STOP_SECONDS)
        with self._lock:
            self._thread = None
            self._table = SlotTable(1, 1, 0)
            self._closed = "the engine has been stopped"

    # The loop.

    def _run(
        self,
        arguments: dict[str, Any],
        resident: list[ServedModel],
        ready: threading.Event,
        problems: list[BaseException],
    ) -> None:
        failure: BaseException | None = None
        loop: LLMEngine | None = None
        try:
            loop = self._make(arguments)
            for slot, model in enumerate(resident):
                self._start_load(loop, self._table.assign(model.name, slot), model)
            ready.set()
            while not self._stopping:
                self._step(loop)
        except BaseException as error:
            failure = error
            if not ready.is_set():
                problems.append(error)
        finally:
            if loop is not None:
                self._free(loop)
            self.on_stop(failure)
            ready.set()

    def _make(self, arguments: dict[str, Any]) -> LLMEngine:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        return LLMEngine.from_engine_args(EngineArgs(**arguments))

    def _free(self, loop: LLMEngine) -> None:
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        loop.engine_core.shutdown()
        destroy_model_parallel()
        destroy_distributed_environment()

    def _step(self, loop: LLMEngine) -> None:
        """Admit, compute one step, and tell what came out; without work, wait for some."""
        self._work.clear()
        self.before_step(loop)
        if not self._generations and not self._probes:
            self._note_statistics(loop)
            self._work.wait(0.05 if self._table.waiting else None)
            return
        outputs = loop.step()
        self._note_statistics(loop)
        for output in outputs:
            generation, probe = self._generations.get(output.request_id), self._probes.get(output.request_id)
            if generation is not None:
                self._deliver(loop, generation, output)
            elif probe is not None and output.finished:
                del self._probes[output.request_id]
                probe.mean = loop.collective_rpc("meswitch_take_probe", args=(output.request_id,))[0] or None
                probe.done.set()

    def _deliver(self, loop: LLMEngine, generation: Generation, output: Any) -> None:
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
            if not output.finished:
                loop.abort_request([generation.id])
                self._note_statistics(loop)
            del self._generations[generation.id]
            self.on_end(generation)

    def _note_statistics(self, loop: LLMEngine) -> None:
        pool = loop.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        blocks = pool.num_gpu_blocks - 1  # one stands for none
        self._blocks = (blocks, blocks - pool.get_num_free_blocks())

    def _begin_probes(self, loop: LLMEngine, probes: Sequence[_Probe]) -> None:
        """Submit prompts to vLLM that it must compute whole: their states are wanted, so no cached ones will do."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=1, detokenize=False, ignore_eos=True, skip_reading_prefix_cache=True
        )
        for probe in probes:
            name = f"probe-{uuid.uuid4().hex}"
            loop.collective_rpc("meswitch_watch", args=(name, self._described.layers_prefix, probe.layer))
            loop.add_request(name, _token_prompt(probe.tokens), params)
            self._probes[name] = probe

    # What it is told.

    def _continuation(self, request: GenerationRequest, model: ServedModel) -> FollowedTokens:
        grammar = self._grammars.grammar(request.sampling, model)
        return FollowedTokens(sampling_params(request.sampling, model), grammar)

    def _begin(self, loop: LLMEngine, generation: Generation) -> None:
        followed = generation.sampler
        assert isinstance(followed, FollowedTokens)
        try:
            loop.add_request(
                generation.id,
                _token_prompt(generation.request.prompt_tokens),
                followed.params,
                lora_request=self._adapters.get(generation.model.name),
            )
        except ValueError as error:
            self.on_failure(generation, error)
            return
        self._generations[generation.id] = generation

    def _abort(self, loop: LLMEngine, generation: Generation) -> None:
        loop.abort_request([generation.id])
        self._generations.pop(generation.id, None)
        self._note_statistics(loop)

    def _start_load(self, loop: LLMEngine, load: Load, model: ServedModel) -> None:
        """Fill a slot before the next step. vLLM's adapters come between steps, so nobody computes meanwhile."""
        problem = None
        try:
            loop.add_lora(self._adapters[model.name])
            self._pin_in_vllm(loop, model.name)
            self._loads = loop.collective_rpc("meswitch_loads")[0]
        except MeswitchError as error:
            problem = str(error)
        except Exception as error:  # whatever it is, it is this expert's and must not stop the others
            problem = f"{model.path}: cannot be loaded: {error}"
        self._on_loaded(load, problem)

    def _prefetch(self, model: ServedModel) -> None:
        """Nothing: vLLM reads an adapter when it puts it into a slot."""

    def _pin_in_vllm(self, loop: LLMEngine, name: str) -> None:
        """Have vLLM keep, or let go, an expert that is in a slot, as the table says."""
        with self._lock:
            item = self._table.experts[name]
            resident, pinned = item.slot is not None, item.pinned
        number = self._adapters[name].lora_int_id
        if resident and pinned:
            loop.pin_lora(number)
        else:
            loop.collective_rpc("meswitch_unpin", args=(number,))

    def _admit_expert(self, loop: LLMEngine, model: ServedModel) -> None:
        with self._lock:
            self._refuse_if_served(model.name)
        layout = bank_layout(self._names, [] if model.artifact is None else [model.artifact.manifest])
        if _added_rows(layout) > _added_rows(self._layout):
            raise EngineError(
                f"expert {model.name!r} has {_added_rows(layout)} tokens of its own, vLLM was started with room for "
                f"{_added_rows(self._layout)}: start the engine with it"
            )
        if not self._layout.holds(layout):
            self._layout = self._layout.joined(layout)
            loop.collective_rpc("meswitch_grow", args=(worker_config(self._layout),))
        self._add(model)

    def _drop_expert(self, loop: LLMEngine, name: str) -> None:
        with self._lock:
            model = self._table.experts[name].model
            self._table.remove(name)
            self._grammars.forget(model)
        loop.remove_lora(self._adapters.pop(name).lora_int_id)

    def _add(self, model: ServedModel) -> None:
        """To the table, and to vLLM's adapters by a name that the cache's keys begin with."""
        from vllm.lora.request import LoRARequest

        if model.artifact is not None:
            name = f"{model.name}@{model.identity}"
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


def _token_prompt(tokens: Sequence[int]) -> Any:
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(tokens))


def _added_rows(layout: Layout) -> int:
    return max((room.added_rows for room in layout.rooms.values()), default=0)


def _logprob(token: int, reported: Any, wanted: int | None) -> TokenLogprob:
    """vLLM reports the chosen token and the likeliest ones in one mapping."""
    best = sorted(reported.items(), key=lambda item: item[1].rank)[: wanted or 0]
    top = tuple((other, float(value.logprob)) for other, value in best)
    return TokenLogprob(token, float(reported[token].logprob), top)
