"""What a GPU would launch in a decode step, counted on a CPU: nothing that is counted as Triton's is computed."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Kind, make_family
from engine.graphs import Graph, stand_in
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from meswitch_cli import engine
from meswitch_cli.engine import modules
from meswitch_cli.engine.contract import GenerationRequest, Sampling
from meswitch_cli.engine.runner import Runner
from meswitch_kernels import dispatch

#: Memory and shapes, which no kernel of PyTorch is launched for on a GPU; and `aminmax`, by which slots are checked
#: where they lie in host memory.
NO_LAUNCH = {
    "empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh", "_unsafe_view", "_local_scalar_dense",
    "aminmax",
}  # fmt: skip
#: Shapes of which 16 divides all widths, as of any 7B model: kernels take several linears at once only then.
SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 272,
}  # fmt: skip
REQUESTS = 4
#: Layers of a 7B model.
WHOLE = 32


class Launches(TorchDispatchMode):
    """Counts operators of PyTorch that a GPU would launch a kernel for. New memory is zero, whoever is to fill it."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode, operators that are made of others arrive whole
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        name = func.overloadpacket.__name__
        if not (self.paused or func.is_view or name in NO_LAUNCH):
            self.counted[name] += 1
        result = func(*args, **kwargs)
        return result.zero_() if name.startswith(("empty", "new_empty")) else result


def step_launches(folder: Path, layers: int, kind: Mapping[str, Any]) -> dict[bool, Counter[str]]:
    """Launches of one decode step by what is launched: of a batch of experts under True, of the base alone under False.

    The model has Mistral's layers, and experts of one kind.
    """
    own = make_family(
        folder,
        "mistral",
        dtype=torch.bfloat16,
        experts={name: Kind(kind) for name in ("one", "two")},
        num_hidden_layers=layers,
        **SHAPE,
    )
    settings = engine.EngineSettings(
        base=str(own.base), experts=own.artifacts, max_model_len=512, cache_tokens=4096, max_running=REQUESTS
    )
    with counting() as found:
        started = engine.TransformersEngine(settings)
        started.start()
        try:
            for names in (["one", "two", "one", "two"], [engine.contract.BASE] * REQUESTS):
                batch = [
                    GenerationRequest(f"{row}", name, (5, 6), Sampling(temperature=0, max_tokens=4, ignore_eos=True))
                    for row, name in enumerate(names)
                ]
                for completion in engine.generate(started, batch):
                    assert completion.error is None
        finally:
            started.stop()
    return found


def whole_step(one: Counter[str], two: Counter[str]) -> Counter[str]:
    """Launches of a step of 32 layers, from those of one and of two."""
    each = two - one
    return Counter({name: one[name] + (WHOLE - 1) * each[name] for name in one | two})


@contextlib.contextmanager
def counting() -> Iterator[dict[bool, Counter[str]]]:
    """Engines that are started meanwhile serve with the Triton backend and graphs; the last decode step of a full batch
    is noted, by whether it has experts."""
    found: dict[bool, Counter[str]] = {}
    active: list[Launches] = []
    replay, compute = Graph.replay, Runner.compute_batch

    def launched(self: Any, *arguments: Any, **named: Any) -> None:
        if active and not active[-1].paused:
            active[-1].counted[self.fn.__name__] += 1

    def replayed(self: Graph) -> None:
        # What the stand-in copies itself, a graph does not.
        forward = self.forward

        def watched() -> None:
            for mode in active:
                mode.paused = False
            forward()
            for mode in active:
                mode.paused = True

        for mode in active:
            mode.paused = True
        self.forward = watched
        try:
            replay(self)
        finally:
            self.forward = forward
            for mode in active:
                mode.paused = False

    def computed(self: Runner, model: Any, batch_data: Any) -> None:
        mode = Launches()
        active.append(mode)
        try:
            with mode:
                compute(self, model, batch_data)
        finally:
            active.pop()
        io = self.inputs_and_outputs
        if self.samples and io.use_block_table and len(io.requests_in_batch) == REQUESTS:
            found[self.mixed] = mode.counted

    caches = (dispatch.default_backend, modules.kernels, engine.proof._problem)
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        patch.setattr(Graph, "replay", replayed)
        patch.setattr(Runner, "compute_batch", computed)
        # There is nothing to compile, and what is not computed proves nothing.
        patch.setattr("meswitch_cli.engine.batching.compile_products", lambda *_: None)
        patch.setattr("meswitch_cli.engine.transformers_engine.why_one_by_one", lambda *_, **__: None)
        for cache in caches:
            cache.cache_clear()
        try:
            yield found
        finally:
            for cache in caches:
                cache.cache_clear()
