"""A Hugging Face checkpoint on disk: its config and the whereabouts of its tensors, weights left unread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.checkpoint.contents import model_contents
from meswitch_cli.checkpoint.fingerprint import tensor_digest
from meswitch_cli.checkpoint.json_file import read_json
from meswitch_cli.checkpoint.quantised import dequantised
from meswitch_cli.checkpoint.source import Source, resolve
from meswitch_cli.checkpoint.tensorfile import MadeTensor, TensorInfo, new_buffer, read_tensor
from meswitch_cli.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE, find_weights, has_weights, refuse_adapter
from meswitch_cli.errors import CheckpointError

#: The entry of config.json by which transformers quantises; null says no more than no entry.
QUANTIZATION = "quantization_config"

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Checkpoint", "read_json"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read.

    Attributes:
        config: config.json, with `tie_word_embeddings` as the weights have it.
        tensors: the model's own tensors, by stored name, and their places.
        notes: where the folder disagrees with itself, and what was taken; for whoever named it to read.
        buffers: by module name, what the model loads into buffers whose values its class gives too.
        extras: by stored name, what transformers does not load for this family.
    """

    source: Source
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...] = ()
    buffers: dict[str, TensorInfo] = field(default_factory=dict)
    extras: dict[str, TensorInfo] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """Open a folder or a Hub id.

        Raises:
            CheckpointError: no safetensors checkpoint of floating-point weights is there, or transformers does not
                know its family as a causal language model.
        """
        source = resolve(name)
        refuse_adapter(source.path)
        config = _plain_config(source, name)
        files = find_weights(source.path, config)
        tensors, notes = files.tensors, files.notes
        quantization = read_json(source.path / "config.json", "").get(QUANTIZATION)
        if quantization is not None:
            tensors, more = dequantised(tensors, quantization, source.path)
            notes += more
        contents = model_contents(config, tensors, str(source.path))
        return cls(source, contents.config, contents.tensors, notes + contents.notes, contents.buffers, contents.extras)

    @classmethod
    def describe(cls, name: str) -> Checkpoint:
        """As `open`, but a folder without weights will do, and of a Hub id the config alone is fetched.

        Where there are no weights, `tensors` is empty.
        """
        source = resolve(name, files=["config.json"])
        refuse_adapter(source.path)
        if has_weights(source.path):
            return cls.open(str(source.path))
        return cls(source, _plain_config(source, name), {})

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def carried(self) -> dict[str, TensorInfo]:
        """What is stored beside the parameters, and belongs to whatever is made of the checkpoint."""
        return self.buffers | self.extras

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    def read(self, name: str, buffer_of: Callable[[int], torch.Tensor] = new_buffer) -> torch.Tensor:
        return read_tensor(self.tensors[name], buffer_of)

    def read_buffers(self) -> dict[str, torch.Tensor]:
        return {name: read_tensor(info) for name, info in self.buffers.items()}

    def digest(self, name: str, parameter: str, value: torch.Tensor) -> str:
        """What a fingerprint has of a parameter whose `value` was read by a stored name: of what is stored of it."""
        info = self.tensors[name]
        if not isinstance(info, MadeTensor) or value.numel() != info.numel:
            return tensor_digest(parameter, value)
        stored = hashlib.sha256(f"{parameter}|{info.dtype}|".encode())
        for part, own in sorted(info.parts.items()):
            stored.update(tensor_digest(part, read_tensor(own)).encode())
        return stored.hexdigest()

    @property
    def is_quantised(self) -> bool:
        """Whether weights are stored in few bits."""
        return any(isinstance(info, MadeTensor) for info in self.tensors.values())

    def files(self) -> set[Path]:
        """The files that its weights lie in."""
        return {info.path for infos in (self.tensors, self.carried) for info in infos.values()}

    @property
    def side_folders(self) -> tuple[Path, ...]:
        """Where tokenizer and the like are; a later folder's files take the place of an earlier one's."""
        return (self.source.path,)

    def stat_digest(self) -> str:
        """A cheap digest of the weight files' sizes and times: equal digests mean the files were not touched."""
        try:
            stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(self.files())]
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _plain_config(source: Source, name: str) -> dict[str, Any]:
    file = source.path / "config.json"
    if not file.is_file() and any(source.path.glob("*.gguf")):
        raise CheckpointError(f"{source.path}: weights only as GGUF; give the 16-bit safetensors checkpoint")
    config = read_json(file, "a checkpoint folder has a config.json")
    quantization = config.get(QUANTIZATION)
    if quantization == {}:
        raise CheckpointError(
            f"{name}: config.json has an empty {QUANTIZATION}, with which transformers does not load the model; "
            "delete the entry if the weights are not quantized"
        )
    return {key: value for key, value in config.items() if key != QUANTIZATION}
