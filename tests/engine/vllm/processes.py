"""vLLM's processes, as tests start them."""

from __future__ import annotations

import functools
import os
from typing import Any

import psutil

from meswitch_cli.engine.vllm.arguments import set_environment

#: What any machine can do: few threads, Dynamo's tracing without a compiler behind it.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
}


@functools.cache
def fork_engines() -> None:
    """Have vLLM fork the processes of an engine: each would spend its first ten seconds on importing vLLM.

    Only where tests make an engine: servers that they start, ours and vLLM's, begin as users' do. The environment has
    vLLM leave its warming up out, which tests of times need.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    set_environment()
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker

    CPUWorker._should_warm_up_model = lambda worker: True
    update = CpuPlatform.check_and_update_config

    def update_and_fork(vllm_config: Any) -> None:
        update(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(update_and_fork)


def children(kind: str, of: int | None = None) -> list[psutil.Process]:
    """Those of `EngineCore` or `Worker` that descend from this process, or another."""
    found = psutil.Process(of).children(recursive=True)
    return [child for child in found if kind in child.name() or any(kind in part for part in child.cmdline())]
