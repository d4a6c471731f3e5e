"""Memory to read tensors into, used again: a fresh page costs more than the copy into it."""

from __future__ import annotations

import threading
import weakref

import torch

#: Smaller tensors are not worth keeping memory for.
SMALLEST = 1 << 20


class BufferPool:
    """Lends buffers; one comes back by itself when the last tensor that lies in it is dropped.

    A buffer that fits no request makes room for one that does, so the pool holds no more than was once in use at the
    same time.
    """

    def __init__(self) -> None:
        self._idle: list[torch.Tensor] = []
        # Re-entrant: dropping a tensor may bring a buffer back at any point of this thread's work.
        self._lock = threading.RLock()

    def empty(self, nbytes: int) -> torch.Tensor:
        """An uninitialised buffer, uint8 `[nbytes]`."""
        if nbytes < SMALLEST:
            return torch.empty(nbytes, dtype=torch.uint8)
        whole = self._fitting(nbytes)
        lent = whole.numpy()[:nbytes]
        # The tensor below, and all views of it, keep `lent` alive through their storage.
        weakref.finalize(lent, self._bring_back, whole).atexit = False
        return torch.from_numpy(lent)

    def _fitting(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            fitting = [buffer for buffer in self._idle if nbytes <= buffer.nbytes <= 2 * nbytes]
            if fitting:
                best = min(fitting, key=lambda buffer: buffer.nbytes)
                self._idle = [buffer for buffer in self._idle if buffer is not best]
                return best
            dropped = 0
            while self._idle and dropped < nbytes:
                dropped += self._idle.pop(0).nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def _bring_back(self, buffer: torch.Tensor) -> None:
        with self._lock:
            self._idle.append(buffer)
