"""Prompts to a router: data, fitting, figures, and changing one that there is."""

from meswitch_cli.router.train.data import Example, RoutingData, gather, read_examples
from meswitch_cli.router.train.editing import add_expert, remove_expert
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import TrainedRouter, train_router

__all__ = [
    "Example",
    "RoutingData",
    "TrainedRouter",
    "TrainingSettings",
    "add_expert",
    "gather",
    "read_examples",
    "remove_expert",
    "train_router",
]
