"""Kernels that are compiled when they are first called, called before the first request: several at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch

from meswitch_cli.engine.modules import ExpertLinear

#: Most of a compilation is the assembler's, a process of its own, so that threads compile side by side.
MOST_THREADS = 16
#: Tokens of batches for which the kernels differ.
SIZES = (16, 32, 64)


def compile_products(linears: Iterable[ExpertLinear], backend: ModuleType, slots: int) -> None:
    """Multiply by one of each kind of linear on a GPU, and of siblings, with batches of each size.

    Nothing is computed that is read. The banks need hold no expert.
    """
    kinds: dict[object, tuple[torch.Tensor, Any, tuple[Any, ...]]] = {}
    for linear in linears:
        together = linear.siblings.layers if linear.siblings is not None else (linear,)
        served = [(item, item.bank.tensors) for item in together if item.bank is not None]
        if not served:
            continue
        kind = tuple(
            (item.weight.shape, item.bias is None, tensors.formats, tensors.left.shape) for item, tensors in served
        )
        operands = [(item.weight, item.bias, tensors) for item, tensors in served]
        multiply: Any = linear.multiply if linear.siblings is None else linear.siblings.multiply
        arguments: tuple[Any, ...] = operands[0] if linear.siblings is None else (operands,)
        kinds.setdefault(kind, (linear.weight, multiply, arguments))

    def call(size: int, weight: torch.Tensor, multiply: Any, arguments: tuple[Any, ...]) -> None:
        with torch.inference_mode(), torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
            slot_of_token = torch.full((size,), -1, dtype=torch.int32, device=weight.device)
            x = weight.new_zeros(size, weight.shape[1])
            multiply(x, *arguments, slot_of_token, backend.group_tokens(slot_of_token, slots))

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "meswitch-compile") as threads:
        for done in [threads.submit(call, size, *kind) for size in SIZES for kind in kinds.values()]:
            done.result()
