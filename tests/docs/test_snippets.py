"""Every page's snippets run, in the page's order, but for those of which `snippets.NOT_RUN` says why they do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forked
from hub.standin import standin

from docs import snippets

#: Tested with what they print, by modules of their own.
ELSEWHERE = ("README.md", "python.md")


PAGES = [page for page in snippets.PAGES if page.name not in ELSEWHERE and any(snippets.blocks(page))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Forked]]:
    """A folder with all that pages take for granted, and the program, for which the Hub is a stand-in."""
    folder = tmp_path_factory.mktemp("pages")
    with standin() as hub:
        program = Forked(snippets.environment(hub.endpoint, tmp_path_factory.mktemp("cache")))
        snippets.make_folder(folder, program)
        snippets.fill_hub(folder, hub.repositories)
        yield folder, program


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, made: tuple[Path, Forked]) -> None:
    with snippets.reader_of(*made) as reader:
        reader.follow(page)
        assert reader.done or reader.skipped


def test_every_reason_is_needed() -> None:
    lines = [line for page in snippets.PAGES for _, text in snippets.blocks(page) for line in text.splitlines()]
    for beginning in (*snippets.NOT_RUN, *snippets.SAMPLES):
        assert any(line.startswith(beginning) for line in lines), beginning
