"""The router: which expert a prompt belongs to, how sure that is, and what happens where it is not.

Its rooms, each importing those before it alone: `decide` (features to a decision), `backends` (prompts to features),
`store` (a router on disk), `train` (data to a router, and its figures).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meswitch_cli.router.decide.router import RouteDecision, Router
    from meswitch_cli.router.store.artifact import write_router
    from meswitch_cli.router.store.loading import open_router
    from meswitch_cli.router.train.data import gather, read_examples
    from meswitch_cli.router.train.settings import TrainingSettings
    from meswitch_cli.router.train.training import train_router

__all__ = [
    "RouteDecision",
    "Router",
    "TrainingSettings",
    "gather",
    "open_router",
    "read_examples",
    "train_router",
    "write_router",
]

_ROOMS = ("decide", "store", "train")


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: a command can list the backends without waiting for torch."""
    for room in _ROOMS if name in __all__ else ():
        module = importlib.import_module(f"{__name__}.{room}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
