"""A delta seen block of rows by block of rows: blocks that stay in the processor's cache, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

#: Elements a block holds: a handful of fp32 temporaries of this size stay in a few MiB of cache.
BLOCK_ELEMENTS = 1 << 18
#: The same for products with a low-rank part's vectors: their sums over rows are as wide as the tensor, block by block.
FACTOR_BLOCK_ELEMENTS = 1 << 20
#: And on any other device than the processor: a launch for every block of a cache's size would take longer than the
#: work, and a few temporaries of 256 MiB find room beside a layer.
DEVICE_BLOCK_ELEMENTS = 1 << 26

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class RowBlocks:
    """The delta `expert - base`, both `[out, in]` of any floating dtype, without ever being whole in memory.

    Both are moved to `device` once, in their own dtype. `subtract` takes what is to be left out off a block, in place,
    given the rows of the block.
    """

    def __init__(
        self,
        base: torch.Tensor,
        expert: torch.Tensor,
        device: torch.device | str,
        subtract: Callable[[torch.Tensor, slice], object] | None = None,
    ) -> None:
        self._base, self._expert, self._subtract = base.to(device), expert.to(device), subtract
        self.shape, self.device = (expert.shape[0], expert.shape[1]), torch.device(device)

    def less(self, subtract: Callable[[torch.Tensor, slice], object]) -> RowBlocks:
        """The same delta with something left out."""
        return RowBlocks(self._base, self._expert, self.device, subtract)

    def sweep(
        self, work: Callable[[torch.Tensor, slice], _Result], elements: int | None = None, *, most: int = 0
    ) -> Iterator[_Result]:
        """Apply a function to each block, fp32 `[rows, in]`, and its place; results come in order.

        Args:
            work: may change the block.
            elements: of a block on the processor, about; None is `BLOCK_ELEMENTS`.
            most: how many blocks are looked at, evenly spread; 0 is all.
        """
        on_processor = self.device.type == "cpu"
        size = (elements or BLOCK_ELEMENTS) if on_processor else DEVICE_BLOCK_ELEMENTS
        step = max(1, size // self.shape[1])
        rows = range(0, self.shape[0], step)
        if most and len(rows) > most:
            rows = rows[:: -(-len(rows) // most)]

        def on_block(row: int) -> _Result:
            place = slice(row, row + step)
            block = self._expert[place].to(dtype=torch.float32, copy=True)
            block.sub_(self._base[place].to(dtype=torch.float32))
            if self._subtract is not None:
                self._subtract(block, place)
            return work(block, place)

        return in_order(on_block, rows, parallel=on_processor)

    def tall(self, work: Callable[[torch.Tensor, slice], _Result]) -> Iterator[_Result]:
        """`sweep` over blocks that suit products with a low-rank part's vectors."""
        return self.sweep(work, FACTOR_BLOCK_ELEMENTS)

    def column_sum(
        self, of_block: Callable[[torch.Tensor], torch.Tensor], elements: int | None = None, *, most: int = 0
    ) -> torch.Tensor:
        """The sum over blocks, float64 `[in]`, of what a function makes of each; `elements`, `most` as in `sweep`."""
        total = torch.zeros(self.shape[1], dtype=torch.float64, device=self.device)
        for part in self.sweep(lambda block, _: of_block(block), elements, most=most):
            total += part
        return total


def in_order(function: Callable[[_Item], _Result], items: Sequence[_Item], *, parallel: bool) -> Iterator[_Result]:
    """Yield `function(item)` for each item, in order.

    In parallel, as many threads as torch is set to use take an item each and use one core for it: operations on
    blocks of a megabyte lose more to waiting for each other than they gain from being split (30 against 9
    nanoseconds of processor time a weight on two cores).
    """
    threads = min(torch.get_num_threads(), len(items)) if parallel else 1
    if parallel and len(items) == 1:
        with one_thread():
            result = function(items[0])
        yield result
        return
    if threads == 1:
        yield from map(function, items)
        return
    try:
        with ThreadPoolExecutor(threads, "blocks", initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, items)
    finally:
        # The setting is also what threads begin with that are started later: an engine's loop, say.
        torch.set_num_threads(torch.get_num_threads())


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread here: some sums and decompositions have other last digits with two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
