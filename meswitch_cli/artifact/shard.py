"""One shard: compressed tensors to bytes and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch

from meswitch_cli.artifact.manifest import TensorEntry
from meswitch_cli.checkpoint.tensorfile import TensorFileError, TensorInfo, read_header, read_tensor, read_tensors
from meswitch_cli.delta.low_rank import LowRank
from meswitch_cli.delta.quantize import QuantizedDelta
from meswitch_cli.errors import ArtifactError

#: The parts of a tensor that its low-rank part is stored as.
LOW_RANK_PARTS = ("left_codes", "left_steps", "right_codes", "right_steps")
_STEP_DTYPES = (torch.float16, torch.float32)
_DTYPES = {
    "codes": (torch.int32,),
    "steps": _STEP_DTYPES,
    "salient_index": (torch.int32,),
    "salient_value": (torch.float16, torch.bfloat16),
    "channel_scale": (torch.float16,),
    "left_codes": (torch.int32,),
    "left_steps": (torch.float32,),
    "right_codes": (torch.int32,),
    "right_steps": (torch.float32,),
    "added_rows": (torch.bfloat16, torch.float16, torch.float32),
    "value": (torch.bfloat16, torch.float16, torch.float32),
}


def delta_tensors(name: str, delta: QuantizedDelta) -> dict[str, torch.Tensor]:
    """The tensors that a delta is stored as, by their names in the shard."""
    tensors = {f"{name}.codes": delta.codes, f"{name}.steps": delta.steps}
    if delta.salient_index.numel():
        tensors[f"{name}.salient_index"] = delta.salient_index
        tensors[f"{name}.salient_value"] = delta.salient_value
    if delta.channel_scale is not None:
        tensors[f"{name}.channel_scale"] = delta.channel_scale
    if delta.low_rank is not None:
        tensors |= {f"{name}.{part}": getattr(delta.low_rank, part) for part in LOW_RANK_PARTS}
    return tensors


def encode_shard(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Safetensors bytes of the tensors; the same tensors give the same bytes."""
    contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
    data: bytes = safetensors.torch.save(contiguous, metadata={"format": "meswitch"})
    return data


class Shard:
    """A shard file whose header agrees with the manifest's entries for it."""

    def __init__(self, path: Path, entries: list[TensorEntry]) -> None:
        """Check the header.

        Raises:
            ArtifactError: the file is damaged, or holds other tensors, shapes or types than the manifest says.
        """
        try:
            self._infos = read_header(path)
        except TensorFileError as error:
            raise ArtifactError(str(error)) from error
        self._entries = {entry.name: entry for entry in entries}
        expected: dict[str, tuple[int, ...]] = {}
        for entry in entries:
            expected |= entry.stored_shapes()
        if set(expected) != set(self._infos):
            odd = sorted(set(expected) ^ set(self._infos))
            holder = "is missing" if odd[0] in expected else "is not in the manifest"
            raise ArtifactError(f"{path}: tensor {odd[0]!r} {holder}")
        for name, shape in expected.items():
            info = self._infos[name]
            if info.shape != shape:
                raise ArtifactError(f"{path}: tensor {name!r} is {list(info.shape)}, the manifest says {list(shape)}")
            if info.dtype not in _DTYPES[name.rpartition(".")[2]]:
                raise ArtifactError(f"{path}: tensor {name!r} has type {info.dtype}")

    def read(self, name: str, part: str) -> torch.Tensor:
        """Read one stored part (`codes`, `steps`, ..., `value`) of a tensor."""
        return self._read(self._infos[f"{name}.{part}"])

    def read_all(self) -> dict[tuple[str, str], torch.Tensor]:
        """Every part of every tensor, by name and part, in one read."""
        try:
            stored = read_tensors(self._infos)
        except TensorFileError as error:
            raise ArtifactError(str(error)) from error
        return {(name.rpartition(".")[0], name.rpartition(".")[2]): tensor for name, tensor in stored.items()}

    def has(self, name: str, part: str) -> bool:
        return f"{name}.{part}" in self._infos

    def delta(self, name: str) -> QuantizedDelta:
        """Read a tensor's delta.

        Raises:
            ArtifactError: salient indices are not ascending channels of the tensor, or a number is not finite.
        """
        entry = self._entries[name]
        rows = min(entry.shape[0], entry.base_shape[0])
        delta = QuantizedDelta(
            entry.bits,
            entry.shape[1],
            entry.group_size,
            self.read(name, "codes"),
            self.read(name, "steps"),
            self.read(name, "salient_index") if entry.salient else torch.empty(0, dtype=torch.int32),
            self.read(name, "salient_value") if entry.salient else torch.empty(rows, 0, dtype=torch.float16),
            self.read(name, "channel_scale") if entry.channel_scale else None,
            LowRank(rows, entry.shape[1], *(self.read(name, part) for part in LOW_RANK_PARTS)) if entry.rank else None,
        )
        index = delta.salient_index
        if index.numel() and not (
            int(index[0]) >= 0 and int(index[-1]) < entry.shape[1] and bool((index[1:] > index[:-1]).all())
        ):
            raise ArtifactError(f"tensor {name!r}: salient channels are not ascending and below {entry.shape[1]}")
        factors = (delta.low_rank.left_steps, delta.low_rank.right_steps) if delta.low_rank else ()
        for tensor in (delta.steps, delta.salient_value, delta.channel_scale, *factors):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ArtifactError(f"tensor {name!r}: a stored number is not finite")
        return delta

    def check_values(self) -> Iterator[str]:
        """Read every tensor once, with the checks of `delta`; yield its name."""
        for entry in self._entries.values():
            if entry.bits:
                self.delta(entry.name)
            for part in ("value", "added_rows"):
                if self.has(entry.name, part) and not torch.isfinite(self.read(entry.name, part)).all():
                    raise ArtifactError(f"tensor {entry.name!r}: a stored number is not finite")
            yield entry.name

    def _read(self, info: TensorInfo) -> torch.Tensor:
        try:
            return read_tensor(info)
        except TensorFileError as error:
            raise ArtifactError(str(error)) from error
