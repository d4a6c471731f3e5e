"""How close compressed experts are to the full ones, what they still can do, and whether a router finds them."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.evaluation.job import Request
    from meswitch_cli.evaluation.report import Report
    from meswitch_cli.evaluation.run import evaluate

__all__ = ["Report", "Request", "evaluate"]

__getattr__ = exporter(__name__, {"Request": "job", "Report": "report", "evaluate": "run"})
