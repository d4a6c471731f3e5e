"""What belongs to an expert beside its parameters: values of buffers, and tensors that transformers does not load.

One side file holds those that differ from the base's, as they are stored; of those that are equal, their digests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import tensor_digest
from meswitch_cli.checkpoint.tensorfile import TensorInfo, read_header, read_tensor
from meswitch_cli.errors import ArtifactError
from meswitch_cli.printable import is_name

if TYPE_CHECKING:
    from meswitch_cli.artifact.artifact import Artifact

CARRIED_TENSORS = "carried.safetensors"
#: The one entry of the file's metadata, JSON; several would come in any order.
_ENTRY = "meswitch"


def carried_file(base: Checkpoint, expert: Checkpoint) -> dict[str, bytes]:
    """The side file of an expert, by its name; nothing where the expert is its parameters alone."""
    equal: dict[str, str] = {}
    own: dict[str, torch.Tensor] = {}
    theirs = base.carried
    for name, info in sorted(expert.carried.items()):
        value = read_tensor(info)
        digest = tensor_digest(name, value)
        if name in theirs and tensor_digest(name, read_tensor(theirs[name])) == digest:
            equal[name] = digest
        else:
            own[name] = value.contiguous()
    if not equal and not own:
        return {}
    told = json.dumps({"equal": equal, "buffers": sorted(expert.buffers)})
    return {CARRIED_TENSORS: safetensors.torch.save(own, metadata={_ENTRY: told})}


@dataclass(frozen=True)
class Carried:
    """The side file of an artifact, read as values are asked for.

    Attributes:
        path: None where the artifact has none.
    """

    path: Path | None

    @classmethod
    def of(cls, artifact: Artifact) -> Carried:
        there = any(file.name == CARRIED_TENSORS for file in artifact.manifest.files)
        return cls(artifact.path / CARRIED_TENSORS if there else None)

    @property
    def own_buffers(self) -> list[str]:
        """Buffers whose values differ from the base's."""
        return sorted(self.own.keys() & set(self._told["buffers"]))

    @cached_property
    def own(self) -> dict[str, TensorInfo]:
        """What is stored, by name."""
        return {} if self.path is None else read_header(self.path)

    def values(self, base: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything, by name, with what equals the base's read from there.

        Raises:
            ArtifactError: the base does not hold it as it did.
        """
        yield from ((name, read_tensor(info)) for name, info in self.own.items())
        theirs = base.carried
        for name, digest in self._told["equal"].items():
            value = read_tensor(theirs[name]) if name in theirs else None
            if value is None or tensor_digest(name, value) != digest:
                raise ArtifactError(
                    f"{self.path}: {name!r} is the base's, which {base.source.path} "
                    f"{'lacks' if value is None else 'has with other values'}; give the base as it was published"
                )
            yield name, value

    def buffers(self, base: Checkpoint) -> dict[str, torch.Tensor]:
        """The values of the model's buffers. Raises as `values`."""
        names = set(self._told["buffers"])
        return {name: value for name, value in self.values(base) if name in names} if names else {}

    @cached_property
    def _told(self) -> dict[str, Any]:
        if self.path is None:
            return {"equal": {}, "buffers": []}
        try:
            with safe_open(self.path, "pt") as file:
                told = json.loads((file.metadata() or {})[_ENTRY])
            equal, buffers = told["equal"], told["buffers"]
            names = [*equal, *equal.values(), *buffers]
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{self.path}: damaged: it does not say what equals the base's") from error
        if not all(is_name(name) for name in names):
            raise ArtifactError(f"{self.path}: damaged: a name in it is none")
        return {"equal": equal, "buffers": buffers}
