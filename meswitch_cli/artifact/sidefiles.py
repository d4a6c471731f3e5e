"""The files beside the shards that are taken from the expert: config, tokenizer, templates, terms of use."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.manifest import SIDE_FILE_NAME
from meswitch_cli.checkpoint.json_file import read_json
from meswitch_cli.checkpoint.tensorfile import is_lfs_pointer
from meswitch_cli.checkpoint.weight_files import NAMED_FILE
from meswitch_cli.errors import CheckpointError

CONFIG_FILE = "config.json"
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
#: Files that a tokenizer has nothing to do with.
_NO_TOKENIZERS = (CONFIG_FILE, "generation_config.json", "processor_config.json", "preprocessor_config.json")
#: What is carried, by name: the config, what any of transformers' tokenizers reads, chat templates, and the terms
#: under which a fine-tune may be passed on.
CARRIED_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*vocab*.json",
    "*vocab*.txt",
    "vocab.bpe",
    "merges.txt",
    "dict.txt",
    "bpe.codes",
    "*.model",
    "*.model.v*",
    "*.spm",
    "*.tiktoken",
    "*.tokenizer",
    "tekken.json",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "chat_template*.jinja",
    "chat_template*.json",
    "processor_config.json",
    "preprocessor_config.json",
    *_LICENCES,
)
#: Where transformers keeps chat templates beside the default one, a file each.
TEMPLATE_FOLDER = "additional_chat_templates"
#: Entries that may name a path of the author's machine, code to run, or a file that restoring does not write.
_PRIVATE_KEYS = ("_name_or_path", "name_or_path", "auto_map", NAMED_FILE)


def expert_files(folder: Path, config: Mapping[str, Any] | None = None, more: Sequence[Path] = ()) -> dict[str, bytes]:
    """Read an expert's files, by path in its folder, free of local paths and of code references.

    `config` is what config.json must say, where the file itself says something else. The files of `more` folders, as of
    an adapter beside its base, take the place of the first's, a tokenizer's all together; config.json stays.

    Raises:
        CheckpointError: a file cannot be read, or is no more than a pointer to one.
    """
    files = _read_files(folder, config)
    for other in more:
        own = {name: data for name, data in _read_files(other, None).items() if name != CONFIG_FILE}
        if any("token" in name for name in own):
            files = {name: data for name, data in files.items() if name in _NO_TOKENIZERS or _is_licence(name)}
        files |= own
    return files


def _is_licence(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _LICENCES)


def _read_files(folder: Path, config: Mapping[str, Any] | None) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name in _carried(folder):
        path = folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if is_lfs_pointer(data):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`")
        if name == CONFIG_FILE and config is not None and read_json(path, "") != config:
            data = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        files[name] = _without_private_keys(data) if name.endswith("config.json") else data
    return files


def _carried(folder: Path) -> list[str]:
    """The paths, inside the folder, of the files that are carried."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and SIDE_FILE_NAME.fullmatch(path.name)]
    templates = [f"{TEMPLATE_FOLDER}/{path.name}" for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    for name in templates:
        if not SIDE_FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{folder / name}: the name of a chat template may hold letters, digits, dots, _ and -; rename the file"
            )
    carried = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in CARRIED_FILES)]
    return carried + templates


def _without_private_keys(data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return data
    if not isinstance(value, dict) or not any(key in value for key in _PRIVATE_KEYS):
        return data
    kept = {key: item for key, item in value.items() if key not in _PRIVATE_KEYS}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
