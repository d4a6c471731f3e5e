"""The way of an expert from a file to a GPU: pinned memory, and one copy of each piece that was read."""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from meswitch_cli.delta.stored import StoredDelta

logger = logging.getLogger(__name__)

#: Pieces that are on the device at once while an expert is copied: in a file codes, steps and salient values lie apart,
#: and the head's stay while it is copied.
_PIECES = 4


def pinned_buffer(nbytes: int) -> Tensor:
    """Uninitialised memory, uint8 `[nbytes]`, from which a GPU copies by itself; unpinned where it cannot be.

    PyTorch's own pinned memory is rounded up to a power of two and never given back.
    """
    memory = mmap.mmap(-1, max(nbytes, 1))  # pages of its own: a page can be registered once
    array = numpy.frombuffer(memory, dtype=numpy.uint8)
    if _register(array.ctypes.data, len(array)):
        weakref.finalize(array, _unregister, array.ctypes.data, memory).atexit = False
    return torch.from_numpy(array[:nbytes])


def _register(address: int, nbytes: int) -> bool:
    code = int(_runtime().cudaHostRegister(address, nbytes, 0))
    if code:
        _warn_unpinned(code)
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.ones(1, device="cuda")  # the error would otherwise be raised by whoever launches next
    return not code


def _unregister(address: int, memory: mmap.mmap) -> None:
    """`memory` is given back after this."""
    _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


@functools.cache
def _warn_unpinned(code: int) -> None:
    logger.warning("host memory cannot be pinned (CUDA error %d): experts are copied more slowly", code)


class StagedCopy(Mapping[str, StoredDelta]):
    """What is stored of an expert, on a device: what was read at once is copied at once when the first of its tensors
    is asked for, and dropped when later ones are.

    Dense tensors and the salient channels stay where they are: they are small, and the channels are looked at.
    """

    def __init__(self, stored: Mapping[str, StoredDelta], device: torch.device) -> None:
        self._stored, self._device = stored, device
        self._pieces: OrderedDict[int, Tensor] = OrderedDict()
        self.copies = 0

    def __getitem__(self, name: str) -> StoredDelta:
        delta = self._stored[name]
        if not delta.bits:
            return delta
        return replace(delta.mapped(self._moved), salient_index=delta.salient_index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def _moved(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() == tensor.nbytes:
            return tensor.to(self._device, non_blocking=True)
        place = storage.data_ptr()
        if place in self._pieces:
            self._pieces.move_to_end(place)
        else:
            piece = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._pieces[place] = piece.to(self._device, non_blocking=True, copy=True)
            self.copies += 1
            if len(self._pieces) > _PIECES:
                self._pieces.popitem(last=False)
        start = tensor.storage_offset() * tensor.element_size()
        return self._pieces[place][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
