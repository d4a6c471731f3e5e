"""Fixtures of the server's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.family import Family, Running, Start, make_family, start
from server.fields import FIELDS, prompts
from server.tool_templates import HERMES

from meswitch_cli.router import Router
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import TrainedRouter, train_router


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def running(family: Family) -> Iterator[Running]:
    """The server that most tests share; nothing in it is changed by any."""
    server = start(family)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def taught(running: Running) -> Iterator[None]:
    """While a module runs, the expert `red` has a chat template that knows of tools."""
    tokenizer = running.service.engine.tokenizer("red")
    before, tokenizer.chat_template = tokenizer.chat_template, HERMES
    yield
    tokenizer.chat_template = before


@pytest.fixture(scope="module")
def trained() -> TrainedRouter:
    """A TF-IDF router that knows the three experts' words."""
    examples = [Example(text, field, f"{field}:{i}") for field in FIELDS for i, text in enumerate(prompts(field, 56))]
    return train_router(gather(examples), TrainingSettings(backend="tfidf"), experts=dict.fromkeys(FIELDS))


@pytest.fixture(scope="module")
def router(trained: TrainedRouter) -> Router:
    return trained.router


@pytest.fixture(scope="module")
def routed(family: Family, router: Router) -> Iterator[Running]:
    """A server that has the router."""
    server = start(family, router=router)
    yield server
    server.stop()


@pytest.fixture
def start_server(family: Family) -> Iterator[Start]:
    """A function that starts a server of a test's own; it is stopped in the end."""
    started: list[Running] = []

    def make(**options: Any) -> Running:
        started.append(start(family, **options))
        return started[-1]

    yield make
    for server in started:
        if server.thread.is_alive():
            server.stop()


@pytest.fixture
def experts_dir(family: Family, tmp_path: Path) -> Path:
    """A folder with a copy of each artifact, to be broken at will."""
    folder = tmp_path / "experts"
    for name, path in family.artifacts.items():
        shutil.copytree(path, folder / name)
    return folder
