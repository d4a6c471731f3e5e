"""The router: which expert a prompt belongs to, how sure that is, and what happens where it is not."""

from meswitch_cli.router.features import HiddenStates
from meswitch_cli.router.router import RouteDecision, Router

__all__ = ["HiddenStates", "RouteDecision", "Router"]
