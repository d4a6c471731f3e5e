"""The cases that every client is tried with, here with those that the test's own environment has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from clients.__main__ import CLIENTS, COLUMNS, Client, environment, table, try_client
from server.family import Running

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


pytestmark = pytest.mark.usefixtures("taught")


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_an_installed_client_does_all_of_its_cases(running: Running, name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    (client,) = (client for client in CLIENTS if client.name == name)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    named = Client(tmp_path.name, client.file, client.packages)
    told = try_client(tmp_path.parent, named, running.url)
    assert told is not None and told.pop("version", None), told
    assert len(told) >= 6 and set(told.values()) == {None}, told


def test_a_client_without_an_environment_is_left_out(tmp_path: Path) -> None:
    assert try_client(tmp_path, CLIENTS[0], "http://127.0.0.1:9") is None
    assert environment(tmp_path, CLIENTS[0]) == tmp_path / "openai"


def test_the_table_tells_what_failed() -> None:
    told: dict[str, dict[str, str | None]] = {
        "x": {"version": "1", "chat": None, "tools": "Error: y"},
        "anthropic": {"version": "2", "chat": None},
    }
    rows = table(told).splitlines()
    assert rows[2] == "| x | 1 | yes |  |  | no |  |  |  |  |"
    assert rows[3] == "| anthropic | 2 | yes |  |  |  |  |  | yes |  |"


def test_every_client_has_its_cases_and_its_row() -> None:
    page = PAGE.read_text(encoding="utf-8")
    folder = Path(__file__).parents[1] / "clients"
    for client in CLIENTS:
        cases = (folder / client.file).read_text(encoding="utf-8")
        assert f"| {client.name} |" in page
        assert any(f'"{column}"' in cases or f"{column}:" in cases for column in COLUMNS)
    files = {*folder.glob("*_python.py"), *folder.glob("*.mjs")}
    assert {path.name for path in files} == {client.file for client in CLIENTS}
