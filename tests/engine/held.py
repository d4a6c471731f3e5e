"""An engine that computes nothing for a while: what runs outlasts what is done meanwhile, on a machine of any speed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meswitch_cli.engine.slotted_engine import SlottedEngine

#: Far longer than any test; a test that hangs ends nevertheless.
MOST_SECONDS = 600.0


@contextmanager
def held(engine: SlottedEngine[Any], *, after: int = 0) -> Iterator[None]:
    """Within, nothing is computed once requests have run through `after` more batches. Nothing comes or goes either:
    requests are taken, ended and given slots between two batches."""
    released = threading.Event()
    go_on, passed = engine.before_batch, 0

    def wait(loop: Any) -> None:
        nonlocal passed
        if passed >= after:
            released.wait(MOST_SECONDS)
        passed += engine.statistics().running > 0
        go_on(loop)

    engine.before_batch = wait
    try:
        yield
    finally:
        engine.before_batch = go_on
        released.set()
