"""Base and expert tensors side by side, read ahead of the work while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import tensor_digest
from meswitch_cli.checkpoint.plan import PlannedTensor

#: Bytes of tensors read but not yet worked on; one more tensor than this may be in memory.
READ_AHEAD_BYTES = 256 << 20


@dataclass(frozen=True)
class TensorPair:
    """One planned tensor with its values, the files they came from, and the digests of what was read."""

    planned: PlannedTensor
    base_file: Path
    expert_file: Path
    base: torch.Tensor
    expert: torch.Tensor
    base_digest: str
    expert_digest: str

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.expert.nbytes


def read_pairs(tensors: Iterable[PlannedTensor], base: Checkpoint, expert: Checkpoint) -> Iterator[TensorPair]:
    """Yield the tensors in order; reading and hashing run in threads, a bounded way ahead."""
    waiting = deque(tensors)
    reading: deque[tuple[int, PlannedTensor, Future[_Read], Future[_Read]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(2, "read") as pool:
        try:
            while waiting or reading:
                while waiting and (not reading or ahead < READ_AHEAD_BYTES):
                    item = waiting.popleft()
                    size = base.tensors[item.base_stored].nbytes + expert.tensors[item.expert_stored].nbytes
                    reading.append(
                        (
                            size,
                            item,
                            pool.submit(_read, base, item.base_stored, item.base_name),
                            pool.submit(_read, expert, item.expert_stored, item.expert_name),
                        )
                    )
                    ahead += size
                size, item, base_future, expert_future = reading.popleft()
                (base_tensor, base_digest), (expert_tensor, expert_digest) = (
                    base_future.result(),
                    expert_future.result(),
                )
                ahead -= size
                yield TensorPair(
                    item,
                    base.tensors[item.base_stored].path,
                    expert.tensors[item.expert_stored].path,
                    base_tensor,
                    expert_tensor,
                    base_digest,
                    expert_digest,
                )
        finally:
            for _, _, *futures in reading:
                for future in futures:
                    future.cancel()


_Read = tuple[torch.Tensor, str]


def _read(checkpoint: Checkpoint, stored: str, name: str) -> _Read:
    tensor = checkpoint.read(stored)
    return tensor, tensor_digest(name, tensor)
