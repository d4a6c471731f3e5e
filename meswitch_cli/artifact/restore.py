"""From an artifact and its base back to an ordinary Hugging Face checkpoint, one tensor at a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
from meswitch_cli.artifact.card import MODEL_CARD
from meswitch_cli.artifact.carried import CARRIED_TENSORS, Carried
from meswitch_cli.artifact.disk import disk_errors, refuse_occupied, whole_folder, write_atomically
from meswitch_cli.artifact.sidefiles import CONFIG_FILE
from meswitch_cli.checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from meswitch_cli.checkpoint.fingerprint import fingerprint, short_fingerprint, tensor_digest
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.architecture import Parameter, architecture
from meswitch_cli.model.dtype import DTYPES, dtype_name, stored_dtype

#: A shard is held in memory while it fills.
MAX_SHARD_BYTES = 1 << 30


def restore(
    artifact: Artifact,
    base: Checkpoint,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_tensor: Callable[[int], None] = lambda nbytes: None,
) -> Path:
    """Write base + delta as a checkpoint that `AutoModelForCausalLM` loads; `dtype` None is the expert's own.

    Every byte of the artifact is checked first. The checkpoint is written beside `out` and appears there whole, after
    the base has proven to be the right one.

    Raises:
        ArtifactError: the artifact is damaged, the base is another one, or `out` is occupied or cannot be written.
    """
    check_base_shapes(artifact.manifest, base)
    out = out.expanduser().absolute()
    refuse_occupied(out, CONFIG_FILE, force=force, what="a checkpoint", error=ArtifactError)
    artifact.check_whole()
    with whole_folder(out, "restoring") as folder:  # not `.partial`: that may be an unfinished artifact's
        digests = _write_weights(artifact, base, folder, dtype, max_shard_bytes, on_tensor)
        refuse_other_base(artifact.manifest, fingerprint(digests.base), base.source.path)
        if artifact.manifest.exact and dtype is None:
            _refuse_other_expert(artifact, fingerprint(digests.expert))
        _write_side_files(artifact, folder, dtype)
    return out


def _write_weights(
    artifact: Artifact,
    base: Checkpoint,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    on_tensor: Callable[[int], None],
) -> _Digests:
    """Write the shards and the index; return the digests of the base that was read and of what was written."""
    digests = _Digests({}, {})
    files: list[tuple[Path, list[str], int]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        path = folder / f"part-{len(files):05d}.safetensors"
        with disk_errors(path):
            safetensors.torch.save_file(pending, path, metadata={"format": "pt"})
        files.append((path, list(pending), pending_bytes))
        pending, pending_bytes = {}, 0

    parameters = _saved_tensors(artifact, _expert_tensors(artifact, base, digests, dtype))
    for name, converted in itertools.chain(parameters, Carried.of(artifact).values(base)):
        if pending and pending_bytes + converted.nbytes > max_shard_bytes:
            flush()
        pending[name] = converted
        pending_bytes += converted.nbytes
        on_tensor(converted.nbytes)
    flush()
    _name_shards(folder, files)
    return digests


class _Digests(NamedTuple):
    """Of tensors, by parameter."""

    base: dict[str, str]
    expert: dict[str, str]


def _refuse_other_expert(artifact: Artifact, found: str) -> None:
    """
    Raises:
        ArtifactError: what was made of an exact artifact is not its expert.
    """
    expert = artifact.manifest.expert
    if found != expert.fingerprint:
        raise ArtifactError(
            f"{artifact.path}: what it restores to has fingerprint {short_fingerprint(found)}, its expert {expert.id} "
            f"has {short_fingerprint(expert.fingerprint)}: damaged when it was made?"
        )


def _expert_tensors(
    artifact: Artifact, base: Checkpoint, digests: _Digests, dtype: torch.dtype | None
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Yield the expert's parameters as they are stored, base tensor by base tensor, noting the digests.

    What is stored whole keeps its own type where `dtype` is None: biases of routers are fp32 among bf16 weights. So
    does everything of an exact artifact.
    """
    base_model = architecture(base.config, str(base.source.path))
    expert_model = architecture(artifact.config, str(artifact.path))
    entries = {entry.name: entry for entry in artifact.manifest.tensors}
    unchanged = set(artifact.manifest.unchanged)
    own_type = DTYPES[artifact.manifest.dtype]
    one_type = dtype or (own_type if own_type != stored_dtype(base) else None)
    by_base: dict[str, list[str]] = {}
    for name, item in expert_model.parameters.items():
        if item.tied_to:
            continue  # the loader ties it again
        if name not in entries and name not in unchanged:
            raise ArtifactError(f"{artifact.path}: the manifest does not list {name!r}")
        by_base.setdefault(base_model.holder(name).name, []).append(name)
    for base_name, storage in base_model.stored(base).items():
        if storage.parameter.tied_to:
            continue
        tensor = storage.read(base)
        digests.base[base_name] = storage.digest(base, tensor)
        for name in by_base.get(base_name, []):
            item = expert_model.parameters[name]
            if name in entries:
                entry = entries[name]
                value = artifact.expert_tensor(entry, tensor)
                own = artifact.shard(entry.shard).value_dtype(name)
                target = dtype or own or own_type
            else:
                value = tensor
                target = one_type or (tensor.dtype if item.kind == "dense" else own_type)
            if artifact.manifest.exact:
                target = dtype or value.dtype
                digests.expert[name] = tensor_digest(name, value.contiguous())
            yield item, item.to_stored(value.to(target)).contiguous()


def _saved_tensors(
    artifact: Artifact, parameters: Iterator[tuple[Parameter, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """As transformers would save them: under its names, and in one tensor what it saves as one."""
    layout = architecture(artifact.config, str(artifact.path)).layout
    stacks: dict[str, tuple[torch.Tensor, int]] = {}
    for item, value in parameters:
        assert item.piece is not None
        saved, index = item.piece.saved, item.piece.index
        if index is None:
            yield layout.saved_name(saved), value
            continue
        count = layout.group_of(item.piece.name).stack
        whole, filled = stacks.pop(saved) if saved in stacks else (value.new_empty((count, *value.shape)), 0)
        whole[index] = value
        if filled + 1 == count:
            yield layout.saved_name(saved), whole
        else:
            stacks[saved] = (whole, filled + 1)


def _name_shards(folder: Path, files: list[tuple[Path, list[str], int]]) -> None:
    if len(files) == 1:
        files[0][0].rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for index, (path, names, _) in enumerate(files):
        final = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    value = {"metadata": {"total_size": sum(size for _, _, size in files)}, "weight_map": weight_map}
    write_atomically(folder / INDEX_FILE, (json.dumps(value, indent=2) + "\n").encode())


def _write_side_files(artifact: Artifact, folder: Path, dtype: torch.dtype | None) -> None:
    for file in artifact.manifest.files:
        if file.name in (MODEL_CARD, CARRIED_TENSORS):
            continue
        data = (artifact.path / file.name).read_bytes()
        if file.name == CONFIG_FILE:
            config = artifact.config
            if dtype is not None:
                config.pop("torch_dtype", None)
                config |= {"dtype": dtype_name(dtype)}
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        with disk_errors(folder / file.name):
            (folder / file.name).parent.mkdir(exist_ok=True)
        write_atomically(folder / file.name, data)
