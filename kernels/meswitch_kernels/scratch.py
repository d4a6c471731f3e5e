"""Memory that the CPU kernels of one thread use again and again."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Scratch(threading.local):
    """Memory that a thread's calls reuse; it grows to the largest call."""

    buffer = torch.empty(0, dtype=torch.uint8)
    address = 0

    def take(self, size: int) -> int:
        """The address, a multiple of 64, of at least `size` bytes."""
        if size + 64 > self.buffer.shape[0]:
            self.buffer = torch.empty(size + 64, dtype=torch.uint8)
            self.address = -(-self.buffer.data_ptr() // 64) * 64
        return self.address

    def tensor(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """The same memory as an uninitialised `[rows, columns]` tensor: fresh pages cost more than merging."""
        size = rows * columns * dtype.itemsize
        first = self.take(size) - self.buffer.data_ptr()
        return self.buffer[first : first + size].view(dtype).view(rows, columns)


scratch = Scratch()
