"""Fixtures of the engine's tests: one tiny family of experts, and engines that are always stopped."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine.family import Family, OneSeed, make_family

from meswitch_cli.engine import EngineSettings, TransformersEngine, proof


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> None:
    """transformers collects garbage whenever an engine stops: leave the imported modules out of that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Llama in fp32 with three experts."""
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def start() -> Iterator[Callable[..., TransformersEngine]]:
    """A function `(family, **settings)` that starts an engine on all of the family's experts."""
    engines = []

    def make(family: Family, **settings: Any) -> TransformersEngine:
        options = {"experts": family.artifacts, "max_model_len": 128, "cache_tokens": 4096, "page_size": 8}
        engine = TransformersEngine(EngineSettings(base=str(family.base), **(options | settings)))
        engine._random = OneSeed()
        engine.start()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def nothing_proven_before() -> Iterator[None]:
    proof._problem.cache_clear()
    yield
    proof._problem.cache_clear()
