"""A Hugging Face checkpoint on disk: its config and the whereabouts of its tensors, weights left unread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.checkpoint.source import Source, resolve
from meswitch_cli.checkpoint.tensorfile import TensorFileError, TensorInfo, new_buffer, read_header, read_tensor
from meswitch_cli.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Buffers that older checkpoints carry although they follow from the config.
_DERIVED_BUFFERS = ("rotary_emb.inv_freq", "attention.masked_bias", "attention.bias", "attn.masked_bias")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read; `tensors` maps a name, as stored, to its place."""

    source: Source
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, name: str) -> Checkpoint:
        """Open a folder or a Hub id.

        Raises:
            CheckpointError: no safetensors checkpoint of floating-point weights is there.
        """
        source = resolve(name)
        config = _plain_config(source, name)
        tensors: dict[str, TensorInfo] = {}
        for path in _weight_files(source.path):
            tensors.update(_headers(path))
        tensors = {key: info for key, info in tensors.items() if not key.endswith(_DERIVED_BUFFERS)}
        for info in tensors.values():
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{info.path}: tensor {info.name!r} is {info.dtype}; weights must be bf16, fp16 or fp32"
                )
        return cls(source, config, tensors)

    @classmethod
    def describe(cls, name: str) -> Checkpoint:
        """As `open`, but a folder without weights will do, and of a Hub id the config alone is fetched.

        Where there are no weights, `tensors` is empty.
        """
        source = resolve(name, files=["config.json"])
        if any((source.path / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
            return cls.open(str(source.path))
        return cls(source, _plain_config(source, name), {})

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    def read(self, name: str, buffer_of: Callable[[int], torch.Tensor] = new_buffer) -> torch.Tensor:
        return read_tensor(self.tensors[name], buffer_of)

    def stat_digest(self) -> str:
        """A cheap digest of the weight files' sizes and times: equal digests mean the files were not touched."""
        files = sorted({info.path for info in self.tensors.values()})
        try:
            stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        except OSError as error:
            raise CheckpointError(f"{error.filename}: {error.strerror}") from error
        return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object, or say what is wrong with the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {hint}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _plain_config(source: Source, name: str) -> dict[str, Any]:
    config = read_json(source.path / "config.json", "a checkpoint folder has a config.json")
    if "quantization_config" in config:
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(f"{name}: already quantized ({method}); give the 16-bit checkpoint")
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.exists():
        weight_map = read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(item, str) for item in weight_map.values()):
            raise CheckpointError(f"{index}: has no weight_map from tensor to file")
        files = sorted(set(weight_map.values()))
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index}: names a file outside the folder: {file!r}")
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {len(missing)} of {len(files)} shards missing: {', '.join(missing[:3])}")
        return [folder / file for file in files]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder}: weights only as pickle ({pickled[0]}), which can run code; save the model as safetensors first"
        )
    raise CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}")


def _headers(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error
