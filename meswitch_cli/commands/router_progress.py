"""What router commands say on stderr while they work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from meswitch_cli.commands.console import progress_bar
from meswitch_cli.commands.progress import quiet_loading


def announce(message: str) -> None:
    """A remark that is not the result."""
    typer.echo(message, err=True)


@contextmanager
def router_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar where stderr is a terminal; the yielded function takes what is done, how much, and of how much."""
    quiet_loading()
    with progress_bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)
