"""Experts' tensors in host memory, between disk and device."""

from __future__ import annotations

from collections import OrderedDict

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.coding import coded
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.banks import Stored
from meswitch_cli.engine.staging import pinned_buffer
from meswitch_cli.model.weights import CheckpointWeights


class HostCopies:
    """Experts in host memory by the digest of their manifest, `limit` bytes at most, the least recently used given up
    first."""

    def __init__(self, limit: int, base: Checkpoint) -> None:
        self.limit, self._base = limit, CheckpointWeights(base)
        self._copies: OrderedDict[str, Stored] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._copies

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(stored) for stored in tuple(self._copies.values()))

    def fetch(self, key: str, artifact: Artifact, *, pinned: bool) -> Stored:
        """An expert's tensors, read from disk where there is no copy; `pinned` so that a GPU copies by itself.

        Raises:
            ArtifactError: a shard is damaged.
        """
        if key in self._copies:
            self._copies.move_to_end(key)
            return self._copies[key]
        stored = artifact.read_all(pinned_buffer) if pinned else artifact.read_all()
        if artifact.manifest.exact:
            stored = coded(artifact, stored, self._base)
        self._put(key, stored)
        return stored

    def forget(self, key: str) -> None:
        self._copies.pop(key, None)

    def _put(self, key: str, stored: Stored) -> None:
        if _nbytes(stored) > self.limit:
            return
        self._copies[key] = stored
        while self.nbytes > self.limit:
            self._copies.popitem(last=False)


def _nbytes(stored: Stored) -> int:
    return sum(delta.nbytes for delta in stored.values())
