"""Base and expert tensors side by side, read ahead of the work while it computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from meswitch_cli.checkpoint.buffers import BufferPool
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.architecture import Storage
from meswitch_cli.model.matching import Plan, PlannedTensor

#: Bytes of tensors read that nobody has asked for yet; one more tensor than this may be in memory. An expert's layer of
#: a 7-billion-parameter model fits, so that a calibration forward finds the next one there.
READ_AHEAD_BYTES = 512 << 20

Side = Literal["base", "expert"]
#: One half of a pair: a tensor of the base or of the expert.
Half = tuple[Side, PlannedTensor]


@dataclass(frozen=True, kw_only=True)
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


_Read = tuple[torch.Tensor, str]


def refuse_non_finite(pair: TensorPair) -> None:
    """
    Raises:
        CheckpointError: a weight of a pair is NaN or infinite.
    """
    for tensor, file, name in (
        (pair.base, pair.base_file, pair.planned.base.name),
        (pair.expert, pair.expert_file, pair.planned.expert.name),
    ):
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file}: tensor {name!r} holds NaN or infinity: the checkpoint is damaged")


class PairReader:
    """Reads and hashes tensors once each, in threads, in the order given and a bounded way ahead of who asks.

    A calibration forward may ask for the expert's tensors before their pairs are asked for: it gets the very tensors
    that the pairs hold later.
    """

    def __init__(self, base: Checkpoint, expert: Checkpoint, order: Iterable[Half]) -> None:
        """Begin to read; use as a context manager, which ends the threads."""
        self._checkpoints: dict[Side, Checkpoint] = {"base": base, "expert": expert}
        self._waiting = deque(order)
        self._reading: dict[tuple[Side, str], Future[_Read]] = {}
        self._held: dict[str, _Read] = {}
        self._ahead = 0
        self._buffers = BufferPool()
        self._threads = ThreadPoolExecutor(2, "read")
        self._read_ahead()

    def __enter__(self) -> PairReader:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def expert(self, item: PlannedTensor) -> torch.Tensor:
        """The expert's tensor, which stays until its pair is taken or it is forgotten."""
        if item.name not in self._held:
            self._held[item.name] = self._take("expert", item)
        return self._held[item.name][0]

    def forget(self, items: Iterable[PlannedTensor]) -> None:
        """Let go of the expert's tensors of pairs that nobody will take."""
        for item in items:
            self._held.pop(item.name, None)

    def pair(self, item: PlannedTensor) -> TensorPair:
        """Both tensors of an item; the reader lets go of them."""
        base, base_digest = self._take("base", item)
        held = self._held.pop(item.name) if item.name in self._held else self._take("expert", item)
        expert, expert_digest = held
        return TensorPair(
            planned=item,
            base_file=item.base.info(self._checkpoints["base"]).path,
            expert_file=item.expert.info(self._checkpoints["expert"]).path,
            base=base,
            expert=expert,
            base_digest=base_digest,
            expert_digest=expert_digest,
        )

    def _take(self, side: Side, item: PlannedTensor) -> _Read:
        future = self._reading.pop((side, item.name))
        self._ahead -= self._nbytes(side, item)
        self._read_ahead()
        return future.result()

    def _read_ahead(self) -> None:
        while self._waiting and (not self._reading or self._ahead < READ_AHEAD_BYTES):
            side, item = self._waiting.popleft()
            self._reading[side, item.name] = self._threads.submit(self._read, side, item)
            self._ahead += self._nbytes(side, item)

    def _read(self, side: Side, item: PlannedTensor) -> _Read:
        storage = _half(side, item)
        tensor = storage.read(self._checkpoints[side], self._buffers.empty)
        return tensor, storage.digest(self._checkpoints[side], tensor)

    def _nbytes(self, side: Side, item: PlannedTensor) -> int:
        return _half(side, item).info(self._checkpoints[side]).nbytes


def _half(side: Side, item: PlannedTensor) -> Storage:
    return item.base if side == "base" else item.expert


class ExpertAhead:
    """The expert's weights for a calibration forward: its layers' are the reader's, the very tensors of the pairs.

    Implements `model.weights.Weights`.
    """

    def __init__(self, expert: Checkpoint, plan: Plan, reader: PairReader) -> None:
        self.name, self.config, self.architecture = str(expert.source.path), expert.config, plan.architecture
        self._expert, self._reader = expert, reader
        self._planned = {item.name: item for item in plan.tensors}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return self._expert.read_buffers()

    def read(self, name: str) -> torch.Tensor:
        item = self._planned[self.architecture.holder(name).name]
        # The matrices of all experts of a layer would be its whole size: they are read again for their pairs.
        alone = item.layer is None or item.stacked
        return item.expert.read(self._expert) if alone else self._reader.expert(item)


def reading_order(
    units: Sequence[Sequence[PlannedTensor]], missing: Sequence[int], *, calibrated: bool
) -> Iterator[Half]:
    """The halves of the missing units' pairs, pair by pair.

    A calibration forward runs all units but the last, the expert's half first, whether they are missing or not; of the
    experts of a mixture it reads what it needs itself.
    """
    for index, unit in enumerate(units):
        runs = calibrated and index < len(units) - 1
        for item in unit if runs else ():
            if not item.stacked:
                yield "expert", item
        for item in unit if index in missing else ():
            yield "base", item
            if not runs or item.stacked:
                yield "expert", item
