"""Load on an OpenAI-compatible endpoint, and what it does to latency and throughput."""

from meswitch_cli.client.client import Endpoint, run_load
from meswitch_cli.client.figures import figures
from meswitch_cli.client.workload import Workload, make_workload

__all__ = ["Endpoint", "Workload", "figures", "make_workload", "run_load"]
