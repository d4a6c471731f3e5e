"""Kernels that are compiled when they are first called, called before the first request: several at a time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import ModuleType
from typing import Any

import torch

from meswitch_cli.engine.modules import ExpertLinear

logger = logging.getLogger(__name__)

#: A compilation holds the interpreter for a few hundredths of its time, so that threads compile side by side.
MOST_THREADS = 16
#: Tokens of batches for which the kernels differ.
SIZES = (16, 32, 64)
#: Seconds between two lines of progress.
TELL_SECONDS = 10.0

#: Weight, bias and bank of each linear of one product.
_Operands = list[tuple[torch.Tensor, Any, Any]]


def compile_products(linears: Iterable[ExpertLinear], backend: ModuleType, slots: int) -> None:
    """Multiply by one of each kind of linear on a GPU, and of siblings, with batches of each size.

    Nothing is computed that is read. The banks need hold no expert. How many kernels there are depends on the codes
    and the kinds of linears, not on the number of layers, nor on how layers mix codes: the kernel of each code, which
    several linears share, is compiled once, and first.
    """
    kinds = _kinds(linears)

    def called(multiply: Any, arguments: tuple[Any, ...], weight: torch.Tensor, size: int) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
                multiply(_zeros(weight, size), *arguments, *_slots(weight, size, backend, slots))

        return call

    separate: dict[object, Callable[[], None]] = {}
    every: list[Callable[[], None]] = []
    for size in SIZES:
        for multiply, operands, together in kinds:
            weight = operands[0][0]
            own = _with_tickets(operands)
            every.append(called(multiply, (own,) if together else own[0], weight, size))
            if hasattr(backend, "separate_products"):
                x, (_, groups) = _zeros(weight, size), _slots(weight, size, backend, slots)
                for key, own in backend.separate_products(x, operands, groups).items():
                    several = len(own) > 1
                    function = backend.expert_linears if several else backend.expert_linear
                    separate.setdefault(key, called(function, (own,) if several else own[0], own[0][0], size))
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "meswitch-compile") as threads:
        _run(threads, list(separate.values()), "kernels")
        _run(threads, every, "products")  # with what comes before them and lies between


def _run(threads: ThreadPoolExecutor, calls: Sequence[Callable[[], None]], what: str) -> None:
    """Run all, and tell how far it has come where it takes long."""
    start = told = time.monotonic()
    for done, future in enumerate(as_completed([threads.submit(call) for call in calls]), 1):
        future.result()
        now = time.monotonic()
        if now - told > TELL_SECONDS or (done == len(calls) and told > start):
            told = now
            logger.info("compiling %s: %d of %d, %.0f s", what, done, len(calls), now - start)


def _kinds(linears: Iterable[ExpertLinear]) -> list[tuple[Any, _Operands, bool]]:
    """How to multiply by one of each kind of linear that has a bank, or of siblings; those at once or not."""
    kinds: dict[object, tuple[Any, _Operands, bool]] = {}
    for linear in linears:
        siblings = linear.siblings
        together = siblings.layers if siblings is not None else (linear,)
        served = [(item, item.bank.tensors) for item in together if item.bank is not None]
        if not served:
            continue
        kind = tuple(
            (item.weight.shape, item.bias is None, held.formats, held.left.shape, held.scaled, held.group_size)
            for item, held in served
        )
        operands = [(item.weight, item.bias, tensors) for item, tensors in served]
        multiply: Any = linear.multiply if siblings is None else siblings.multiply
        kinds.setdefault((siblings is None, kind), (multiply, operands, siblings is not None))
    return list(kinds.values())


def _with_tickets(operands: _Operands) -> _Operands:
    """The same with tickets of their own: products that are computed at once may not share them."""
    return [
        (weight, bias, type(held)._make(held._replace(tickets=torch.zeros_like(held.tickets))))
        for weight, bias, held in operands
    ]


def _zeros(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    return weight.new_zeros(tokens, weight.shape[1])


def _slots(weight: torch.Tensor, tokens: int, backend: ModuleType, slots: int) -> tuple[torch.Tensor, Any]:
    """Tokens of the base, and their groups."""
    slot_of_token = torch.full((tokens,), -1, dtype=torch.int32, device=weight.device)
    return slot_of_token, backend.group_tokens(slot_of_token, slots)
