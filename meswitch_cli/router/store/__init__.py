"""A router on disk, and whether it belongs to a base and to experts."""

from meswitch_cli.router.store.artifact import RouterArtifact, write_router
from meswitch_cli.router.store.loading import open_router
from meswitch_cli.router.store.membership import Policy, TrainedFor, check_membership

__all__ = [
    "Policy",
    "RouterArtifact",
    "TrainedFor",
    "check_membership",
    "open_router",
    "write_router",
]
