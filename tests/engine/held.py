"""An engine that computes nothing for a while: what runs outlasts what is done meanwhile, on a machine of any speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from patience import PATIENCE

from meswitch_cli.engine.slotted_engine import SlottedEngine

#: Longer than any test waits; one that hangs ends nevertheless.
MOST_SECONDS = 2 * PATIENCE


class Hold:
    """Stands before an engine's batches: while it is on, `after` more in which requests run are computed, then none.

    What an engine does between two batches it goes on to do: requests come and are cancelled, experts are loaded,
    unloaded and read ahead.
    """

    def __init__(self, engine: SlottedEngine[Any], is_on: Callable[[], bool], after: int) -> None:
        self._engine, self._is_on, self._after = engine, is_on, after
        self._go_on, self._passed = engine.before_batch, 0

    def __call__(self, loop: Any) -> None:
        self._go_on(loop)
        if not self._is_on():
            self._passed = 0
            return
        end = time.monotonic() + MOST_SECONDS
        while self._passed >= self._after and self._runs and self._is_on() and time.monotonic() < end:
            time.sleep(0.005)
            self._go_on(loop)
        self._passed += self._runs

    @property
    def _runs(self) -> bool:
        return self._engine.statistics().running > 0


@contextmanager
def held(engine: SlottedEngine[Any], *, after: int = 0) -> Iterator[Callable[[], None]]:
    """Hold an engine within, until what is given is called."""
    released = threading.Event()
    with _before_batches(engine, Hold(engine, lambda: not released.is_set(), after)):
        try:
            yield released.set
        finally:
            released.set()


@contextmanager
def gathered(engine: SlottedEngine[Any], requests: int) -> Iterator[None]:
    """Hold an engine within until so many requests run or wait."""
    seen = False

    def too_few() -> bool:
        nonlocal seen
        numbers = engine.statistics()
        seen = seen or numbers.running + numbers.waiting >= requests
        return not seen

    with _before_batches(engine, Hold(engine, too_few, 0)):
        yield


@contextmanager
def _before_batches(engine: SlottedEngine[Any], hold: Hold) -> Iterator[None]:
    go_on = engine.before_batch
    engine.before_batch = hold
    try:
        yield
    finally:
        engine.before_batch = go_on
