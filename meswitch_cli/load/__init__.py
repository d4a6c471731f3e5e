"""Load on an OpenAI-compatible endpoint, and what it does to latency and throughput."""

from meswitch_cli.load.client import Endpoint, run_load
from meswitch_cli.load.figures import figures
from meswitch_cli.load.workload import Workload, make_workload

__all__ = ["Endpoint", "Workload", "figures", "make_workload", "run_load"]
