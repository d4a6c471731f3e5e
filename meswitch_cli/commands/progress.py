"""The progress bar on stderr; nothing where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from meswitch_cli.commands.console import progress_bar


def quiet_loading() -> None:
    """Have transformers show no bar of its own, which would smear ours; the Hub's, of downloads, stay."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        enable_progress_bars,
    )
    from transformers.utils import logging

    disabled = are_progress_bars_disabled()
    logging.disable_progress_bar()  # the Hub's too
    if not disabled:
        enable_progress_bars()


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done of `total`; the yielded function takes bytes that are newly done."""
    with _bar() as progress:
        task = progress.add_task(what, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


@contextmanager
def work_progress(total: int, units: int) -> Iterator[Callable[[str, int, int], None]]:
    """As `byte_progress`, with what is being done and how many of the units (layers, and the rest) are finished."""
    with _bar() as progress:
        task = progress.add_task("plan", total=total)

        def advance(what: str, nbytes: int, done: int) -> None:
            progress.update(task, description=f"{what}, {done}/{units} units", advance=nbytes)

        yield advance


def _bar() -> Progress:
    return progress_bar(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
