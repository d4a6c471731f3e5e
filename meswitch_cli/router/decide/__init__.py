"""Features to a decision: scores, how sure they are, the gates, and the conversation that a prompt belongs to."""

from meswitch_cli.router.decide.model import Judgement, RouterModel
from meswitch_cli.router.decide.router import Reason, RouteDecision, Router

__all__ = ["Judgement", "Reason", "RouteDecision", "Router", "RouterModel"]
