"""Which files a checkpoint's weights lie in: those that transformers loads from the folder, and no others.

The order is that of `transformers.modeling_utils._get_resolved_checkpoint_files`: the file that config.json names, then
`model.safetensors`, then the index. Saving anew as one file leaves an earlier index behind, so a folder may hold both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch_cli.checkpoint.json_file import read_json
from meswitch_cli.checkpoint.tensorfile import TensorFileError, TensorInfo, read_header
from meswitch_cli.errors import CheckpointError

#: What makes a folder an artifact of ours; its reader is `artifact/manifest.py`.
ARTIFACT_FILE = "meswitch.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"

#: The entry of config.json by which transformers takes another file.
NAMED_FILE = "transformers_weights"
#: Shards of torch.distributed.checkpoint, which transformers takes before anything else.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(r"model\.(?P<variant>[^.]+)(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.\S+\.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
#: Weights in formats that are not read, but that a folder of weights may hold beside those that are.
_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "consolidated*.pth", "*.gguf")
_FIRST = 3


@dataclass(frozen=True)
class WeightFiles:
    """The tensors that a folder's files hold, by stored name, and what in the folder does not agree."""

    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...]


def has_weights(folder: Path) -> bool:
    """Whether there is a file of weights by one of the usual names."""
    return any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder of a LoRA or another adapter, alone or beside a model's weights.

    Raises:
        CheckpointError: `adapter_config.json` is there, or an adapter's weights and no others.
    """
    file = folder / ADAPTER_CONFIG
    weights = sorted(path.name for path in folder.glob("adapter_model*"))
    if not file.is_file() and (not weights or has_weights(folder)):
        return
    config = read_json(file, "") if file.is_file() else {}
    kind = str(config.get("peft_type") or "LoRA")
    if has_weights(folder):
        raise CheckpointError(
            f"{folder}: holds a model's weights and an adapter ({kind}, {ADAPTER_CONFIG}), which transformers loads "
            "on top of them where peft is installed. If the adapter is merged already, delete "
            f"{', '.join([ADAPTER_CONFIG, *weights])}; if not, merge it: merge_and_unload(), then save_pretrained"
        )
    raise CheckpointError(
        f"{folder}: an adapter ({kind}), not a model; merge it into its base first: "
        "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)"
    )


def find_weights(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """Read the headers of the files that transformers would load from a folder with this config.json.

    Raises:
        CheckpointError: there are none, one is missing or damaged, or they are of a kind that is not read.
    """
    distributed = sorted(path.name for path in folder.iterdir() if _DISTRIBUTED.fullmatch(path.name))
    if distributed:
        raise CheckpointError(
            f"{folder}: {distributed[0]} is part of a distributed checkpoint; load it with transformers and save the "
            "model as ordinary safetensors"
        )
    main, notes = _main_file(folder, config)
    if main.name.endswith(".json"):
        files, index_notes, weight_map = _indexed_files(main)
        tensors, disagreements = _merged(main, files, weight_map)
        notes += index_notes + disagreements
    else:
        files, tensors = [main], _headers(main)
    return WeightFiles(tensors, (*notes, *_not_read(folder, files, main.name)))


def _main_file(folder: Path, config: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """The weights' file or index, and what is to be said of the choice."""
    named = config.get(NAMED_FILE)
    if named is not None:
        return _named_file(folder, named), []
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return single, _stale_index(index)
    if index.is_file():
        return index, []
    raise CheckpointError(_no_weights(folder))


def _named_file(folder: Path, named: object) -> Path:
    usable = isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    if not usable or Path(str(named)).name != named:
        raise CheckpointError(
            f"{folder}: config.json gives {NAMED_FILE} {named!r}; it must name a .safetensors file or index beside it"
        )
    if not (folder / named).is_file():
        raise CheckpointError(f"{folder}: config.json gives {NAMED_FILE} {named!r}, which is not there")
    return folder / named


def _stale_index(index: Path) -> list[str]:
    """What to say of an index beside the single file, which is not read."""
    if not index.is_file():
        return []
    try:
        others = sorted(set(_weight_map(index).values()) - {SINGLE_FILE})
    except CheckpointError:
        others = ["files that it does not tell"]
    if not others:
        return []
    return [
        f"{index.parent}: {SINGLE_FILE} is read, as transformers does; {INDEX_FILE} beside it names {_few(others)}: "
        "of an earlier save? Delete the one that is old"
    ]


def _no_weights(folder: Path) -> str:
    if (folder / ARTIFACT_FILE).is_file():
        return (
            f"{folder}: an artifact, where a whole model is asked for; make one of it: "
            f"meswitch restore {folder} --base BASE --out NEW_FOLDER"
        )
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).is_symlink():
            return f"{folder / name}: a link to a file that is not there; was the download interrupted?"
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    variants = [name for name in names if _VARIANT.fullmatch(name)]
    if variants:
        return (
            f"{folder}: weights only as a variant ({_few(variants)}), which transformers loads only when told to; "
            f"save the model without a variant, as {SINGLE_FILE}"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return (
            f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}; {_few(others)} has another name, "
            "under which transformers loads no model"
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{folder}: weights only as GGUF; give the 16-bit safetensors checkpoint"
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: weights only as pickle ({pickled[0]}), which can run code; save the model as safetensors first"
        )
    return f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}"


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(item, str) for item in weight_map.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor to file")
    return weight_map


def _indexed_files(index: Path) -> tuple[list[Path], list[str], dict[str, str]]:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names a file outside the folder: {name!r}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent}: {len(missing)} of {len(names)} shards missing: {_few(missing)}")
    notes = []
    if not isinstance(read_json(index, "").get("metadata"), dict):
        notes.append(f"{index}: has no metadata, without which transformers does not load it")
    return [index.parent / name for name in names], notes, weight_map


def _merged(index: Path, files: list[Path], weight_map: Mapping[str, str]) -> tuple[dict[str, TensorInfo], list[str]]:
    """All tensors of the files, of the last file where two hold one; and where the index says otherwise."""
    tensors: dict[str, TensorInfo] = {}
    twice: dict[str, list[str]] = {}
    for path in files:
        for name, info in _headers(path).items():
            if name in tensors:
                twice.setdefault(name, [tensors[name].path.name]).append(path.name)
            tensors[name] = info
    notes = []
    if twice:
        name, holders = next(iter(twice.items()))
        notes.append(
            f"{index.parent}: {len(twice)} tensors are in more than one file, the first is {name!r} in "
            f"{' and '.join(holders)}; the last file's is taken, as transformers does. Are the files of two saves?"
        )
    elsewhere = [name for name, file in weight_map.items() if name not in twice and _holder(tensors.get(name)) != file]
    unlisted = sorted(set(tensors) - set(weight_map))
    if elsewhere:
        held = _holder(tensors.get(elsewhere[0]))
        notes.append(
            f"{index}: {len(elsewhere)} tensors are not in the file that it names for them, the first is "
            f"{elsewhere[0]!r}: {weight_map[elsewhere[0]]} named, {f'{held} holds it' if held else 'no file holds it'}"
        )
    if unlisted:
        notes.append(
            f"{index}: {len(unlisted)} tensors in its files are not listed in it, the first is {unlisted[0]!r}"
        )
    return tensors, notes


def _holder(info: TensorInfo | None) -> str | None:
    return None if info is None else info.path.name


def _not_read(folder: Path, files: list[Path], main: str) -> list[str]:
    """What to say of other weights in the folder."""
    read = {path.name for path in files}
    others = sorted({path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)} - read)
    return [f"{folder}: {main} is read, {_few(others)} is not, as transformers does"] if others else []


def _few(names: list[str]) -> str:
    more = len(names) - _FIRST
    return ", ".join(names[:_FIRST]) + (f" and {more} more" if more > 0 else "")


def _headers(path: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(path)
    except TensorFileError as error:
        raise CheckpointError(str(error)) from error
