"""A function that reports on the way, turned into a generator of its reports."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class _Abandoned(BaseException):
    """Ends a function whose reports nobody wants any more."""


def in_turns(run: Callable[[Callable[[T], None]], None]) -> Iterator[T]:
    """Yield what `run` passes to the function that it is called with.

    It has a thread of its own, because it can only stop in the middle of somebody else's code (a model's forward), but
    never works beside the caller: it stands still from each report until the next is asked for. What it raises is
    raised here; a generator that is closed early ends it.
    """
    reports: SimpleQueue[T | None] = SimpleQueue()
    go_on = threading.Semaphore(0)
    abandoned = False

    def report(item: T) -> None:
        reports.put(item)
        go_on.acquire()
        if abandoned:
            raise _Abandoned

    with ThreadPoolExecutor(1, "turns") as thread:
        working = thread.submit(run, report)
        working.add_done_callback(lambda _: reports.put(None))
        try:
            while (item := reports.get()) is not None:
                yield item
                del item  # it may be large, and the next is about to be made
                go_on.release()
            working.result()
        finally:
            abandoned = True
            go_on.release()
