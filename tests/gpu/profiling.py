"""What one decode step launches, from the profiler of PyTorch."""

from __future__ import annotations

import time

import torch

from gpu.load import Load, Steps
from meswitch_cli.engine import TransformersEngine

#: Calls of the driver and its runtime that put work on the device.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
STEPS = 24


#: Decoder layers of a whole Mistral-7B.
WHOLE = 32


def profiled(engine: TransformersEngine, experts: list[str], steps: Steps, new: int, layers: int) -> dict[str, object]:
    """Kernels and launches of a step while one request of each expert decodes, and the kernels that take longest.

    Of 32 layers there would be as many more as every layer of these launches. Without a card there are none.

    Raises:
        RuntimeError: the steps end before there is anything to count.
    """
    from torch.profiler import ProfilerActivity, profile

    card = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card else [])]
    with profile(activities=activities):  # the first one takes a second to begin
        torch.ones(1, device="cuda" if card else "cpu").add_(1)
    load = Load(engine)
    for name in experts:
        load.add(name, 8, new)
    _reach(steps, load.began, 8)
    with profile(activities=activities) as profiler:
        before = len(steps.seen)
        _reach(steps, load.began, len(steps.since(load.began)) + STEPS)
        counted = len(steps.seen) - before
    load.cancel()
    rows = profiler.key_averages()
    on_device = [row for row in rows if str(row.device_type).endswith("CUDA")]
    host = {row.key: row.count for row in rows if row.key.startswith(LAUNCHES)}
    on_device.sort(key=lambda row: -row.self_device_time_total)
    return {
        "steps": counted,
        "kernels_per_step": sum(row.count for row in on_device) / counted,
        "kernels_of_32_layers": sum(_of_whole(row.count / counted, layers) for row in on_device),
        "launches_per_step": sum(host.values()) / counted,
        "device_ms_per_step": sum(row.self_device_time_total for row in on_device) / counted / 1e3,
        "host_calls": {name: count / counted for name, count in sorted(host.items())},
        "top": [
            {
                "kernel": row.key[:80],
                "per_step": row.count / counted,
                "us_per_step": row.self_device_time_total / counted,
            }
            for row in on_device[:16]
        ],
    }


def _of_whole(count: float, layers: int) -> float:
    """Launches of one kind in a step of 32 layers: what every layer launches, and once what is left."""
    each = int(count + 0.01) // layers
    return count + each * (WHOLE - layers)


def _reach(steps: Steps, began: float, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(steps.since(began)) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {len(steps.since(began))} of {count} steps in 20 s")
        time.sleep(0.002)
