"""Hidden states that an interrupted training has read: the next one goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from meswitch_cli.artifact.disk import disk_errors, write_atomically


@dataclass(frozen=True)
class ReadBatches:
    """One file for each batch of prompts, named by what was read of what.

    A batch is kept whole, since what it gives depends in its last bits on the prompts that are computed beside each
    other: a training that goes on gives the bytes of one that was never interrupted.

    Attributes:
        folder: made when the first batch is kept.
        identity: of the base and of the arithmetic.
    """

    folder: Path
    identity: str

    def get(
        self, token_ids: Sequence[Sequence[int]], layers: Sequence[int], size: int
    ) -> dict[int, torch.Tensor] | None:
        """By layer `[n, size]` fp32; None where the batch is not there, or its file is not what it should be."""
        file = self._file(token_ids, layers)
        if not file.is_file():
            return None
        try:
            found = safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError):  # a damaged file costs a batch
            return None
        kept = {layer: found.get(str(layer)) for layer in layers}
        right = {
            layer: tensor
            for layer, tensor in kept.items()
            if tensor is not None and tensor.shape == (len(token_ids), size) and tensor.dtype == torch.float32
        }
        return right if len(right) == len(kept) and all(item.isfinite().all() for item in right.values()) else None

    def put(self, token_ids: Sequence[Sequence[int]], found: Mapping[int, torch.Tensor]) -> None:
        """Keep a batch.

        Raises:
            ArtifactError: the disk refuses.
        """
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {str(layer): tensor.contiguous() for layer, tensor in found.items()}
        write_atomically(self._file(token_ids, list(found)), safetensors.torch.save(tensors))

    def _file(self, token_ids: Sequence[Sequence[int]], layers: Sequence[int]) -> Path:
        digest = hashlib.sha256(f"{self.identity}\n{sorted(layers)}\n".encode())
        for ids in token_ids:
            digest.update(f"{list(ids)}\n".encode())
        return self.folder / f"{digest.hexdigest()}.safetensors"
