"""Fixtures of the server's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .family import Family, Running, make_family, start

__all__ = ["Family", "Running", "Start", "start"]

Start = Callable[..., Running]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def running(family: Family) -> Iterator[Running]:
    """The server that most tests share; nothing in it is changed by any."""
    server = start(family)
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
