"""How close compressed experts are to the full ones, what they still can do, and whether a router finds them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meswitch_cli.evaluation.job import Request
    from meswitch_cli.evaluation.report import Report
    from meswitch_cli.evaluation.run import evaluate

__all__ = ["Report", "Request", "evaluate"]


def __getattr__(name: str) -> Any:
    """Load what is asked for: `meswitch eval --help` names the baselines, and needs no torch."""
    homes = {"Report": "report", "Request": "job", "evaluate": "run"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)
