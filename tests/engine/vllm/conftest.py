"""The engine's fixtures for vLLM: the same family, with heads of a width that its attention on a CPU takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from engine.family import Family, make_family
from engine.vllm.processes import fork_engines

from meswitch_cli.engine import EngineSettings
from meswitch_cli.engine.vllm.engine import VllmEngine

#: vLLM takes minutes to install and wants transformers of its own: `make vllm` makes an environment for these tests.
NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make vllm` runs these")

HEAD_DIM = 32
#: The smallest that vLLM's attention on a CPU takes.
PAGE_SIZE = 32


@pytest.fixture(scope="session", autouse=True)
def forked() -> None:
    if find_spec("vllm") is not None:
        fork_engines()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Llama in fp32 with three experts."""
    return make_family(tmp_path_factory.mktemp("family"), head_dim=HEAD_DIM)


@pytest.fixture
def start() -> Iterator[Callable[..., VllmEngine]]:
    """A function `(family, **settings)` that starts an engine on all of the family's experts."""
    engines = []

    def make(family: Family, **settings: Any) -> VllmEngine:
        engine = make_engine(family, **settings)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()
    gc.collect()


def make_engine(family: Family, **settings: Any) -> VllmEngine:
    """A started engine. One process has one at a time."""
    options = {"experts": family.artifacts, "max_model_len": 128, "cache_tokens": 4096, "page_size": PAGE_SIZE}
    engine = VllmEngine(EngineSettings(base=str(family.base), dtype="float32", **(options | settings)))
    engine.start()
    return engine
