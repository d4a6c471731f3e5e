"""The router: which expert a prompt belongs to, how sure that is, and what happens where it is not.

Its rooms, each importing those before it alone: `decide` (features to a decision), `backends` (prompts to features),
`store` (a router on disk), `train` (data to a router, and its figures).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

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

__getattr__ = exporter(
    __name__,
    {
        "RouteDecision": "decide.router",
        "Router": "decide.router",
        "TrainingSettings": "train.settings",
        "gather": "train.data",
        "open_router": "store.loading",
        "read_examples": "train.data",
        "train_router": "train.training",
        "write_router": "store.artifact",
    },
)
