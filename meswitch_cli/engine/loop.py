"""What the embedded engine and the loop that computes its requests ask of each other."""

from __future__ import annotations

from typing import Protocol

from meswitch_cli.engine.generation import Generation


class Loop(Protocol):
    """Computes requests, one step after the other; called from its own thread, between two steps."""

    def admit(self, generation: Generation) -> None:
        """Take a request, whose expert is in its slot."""

    def cancel(self, request_id: str) -> None:
        """Compute a request no further, and free what it holds."""

    def banks_moved(self) -> None:
        """What an expert is read from lies elsewhere now."""

    def forget_prefixes(self) -> None:
        """Keep nothing of requests that have ended."""


class LoopThread(Protocol):
    """A loop and its thread; called from any other."""

    def start(self) -> None: ...
    def is_running(self) -> bool: ...

    def wake(self) -> None:
        """Have the loop look for work now."""

    def end(self) -> None:
        """Have the thread end, and wait for it; requests that are left are told by `on_stop`."""

    def cache_use(self) -> tuple[int, int]:
        """Blocks of the cache, and how many of them are in use."""


class Hooks(Protocol):
    """What a loop tells the engine, always from its own thread."""

    def before_batch(self, loop: Loop, /) -> None: ...
    def on_end(self, generation: Generation) -> None: ...
    def on_failure(self, generation: Generation, error: Exception) -> None: ...
    def on_stop(self, error: BaseException | None) -> None: ...
