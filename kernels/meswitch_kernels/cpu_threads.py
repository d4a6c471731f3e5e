"""Run a compiled task on as many threads as PyTorch uses, from PyTorch's own pool where it can be found.

A second pool beside PyTorch's can fight it for the cores, since OpenMP workers spin for a while after each
operator: launches through numba's own took between 6 and 125 us by turns (docs/results/kernels-cpu.md).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel` of the OpenMP library that PyTorch ships, or None where it ships none."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        entry = ctypes.CDLL(str(library)).GOMP_parallel
        entry.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="meswitch")


@functools.cache
def _callable(task: int) -> Callable[[int], None]:
    return TASK(task)


def run_task(task: int, argument: int, units: int) -> None:
    """Call the compiled function at address `task` with `argument` on up to `torch.get_num_threads()` threads.

    The threads share `units` pieces of work through a counter of their own, so it does not matter how many
    of them really come.
    """
    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        _callable(task)(argument)
    elif parallel := _parallel():
        parallel(task, argument, threads, 0)
    else:
        list(_pool(threads).map(_callable(task), [argument] * threads))
