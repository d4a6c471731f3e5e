"""Work that other threads have done by the loop, between two batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from meswitch_cli.engine.contract import ShuttingDownError

#: What computes the batches, in a thread of its own.
Loop = TypeVar("Loop")

#: How often one who waits looks whether the loop still runs, in seconds.
PATIENCE = 0.1


class BetweenBatches(Generic[Loop]):
    """Nothing generates while such work is done, so it may change what a forward pass reads."""

    def __init__(self, wake: Callable[[], None], is_over: Callable[[], bool]) -> None:
        """`wake` has the loop look for work; `is_over` says whether it will never run again."""
        self._wake, self._is_over = wake, is_over
        self._left: queue.SimpleQueue[Callable[[Loop], None]] = queue.SimpleQueue()

    def run(self, work: Callable[[Loop], None]) -> None:
        """Have `work` done; return when it is, raise what it raises.

        Raises:
            ShuttingDownError: the loop has ended before.
        """
        done = threading.Event()
        problems: list[Exception] = []

        def noted(loop: Loop) -> None:
            try:
                work(loop)
            except Exception as error:
                problems.append(error)
            finally:
                done.set()

        self._left.put(noted)
        self._wake()
        while not done.wait(PATIENCE):
            if self._is_over():
                raise ShuttingDownError("the engine has stopped")
        if problems:
            raise problems[0]

    def do(self, loop: Loop) -> None:
        """Do what has been handed over, in the loop's thread."""
        while not self._left.empty():
            self._left.get_nowait()(loop)
