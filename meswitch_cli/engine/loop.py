"""What a loop that computes requests tells the engine."""

from __future__ import annotations

from typing import Protocol, TypeVar

from meswitch_cli.engine.generation import Generation

Loop = TypeVar("Loop", contravariant=True)


class Hooks(Protocol[Loop]):
    """Called by the loop, always from its own thread."""

    def before_batch(self, loop: Loop, /) -> None: ...
    def on_end(self, generation: Generation) -> None: ...
    def on_failure(self, generation: Generation, error: Exception) -> None: ...
    def on_stop(self, error: BaseException | None) -> None: ...
