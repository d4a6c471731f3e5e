"""A model's own tokenizer, from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meswitch_cli.checkpoint.json_file import read_json
from meswitch_cli.errors import CheckpointError, MeswitchError, reason_of

#: No length of its own: prompts are cut or refused where they are taken in, and the tokenizer need not warn of them.
_ANY_LENGTH = 1 << 30


def load_tokenizer(folder: Path, error: type[MeswitchError] = CheckpointError) -> Any:
    """Load a tokenizer from its files alone, without running code from the folder.

    Raises:
        CheckpointError, or `error`: the folder has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, model_max_length=_ANY_LENGTH
        )
    except Exception as problem:  # transformers and tokenizers raise many kinds for a file they cannot use
        raise error(f"{folder}: its tokenizer cannot be loaded: {reason_of(problem)}") from problem


def tokenizer_folder(folders: Sequence[Path]) -> Path:
    """The last of these folders that has a tokenizer, or the first where none has."""
    return next((folder for folder in reversed(folders) if has_tokenizer(folder)), folders[0])


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def tokenizer_note(folder: Path, vocabulary: int) -> str | None:
    """What is wrong with the tokenizer of a model whose embedding has so many rows; None if nothing is.

    Weights can be compressed and restored without one; serving needs it.
    """
    try:
        tokenizer = load_tokenizer(folder)
    except CheckpointError as error:
        return f"{error}. The artifact can be restored but not served; copy the tokenizer's files into the folder"
    longest = max(tokenizer.get_vocab().values(), default=-1)
    if longest >= vocabulary:
        return (
            f"{folder}: its tokenizer knows tokens up to {longest}, its embedding has {vocabulary} rows; "
            "a text that holds one of the others is refused"
        )
    return None


def end_ids(path: Path, tokenizer: Any) -> frozenset[int]:
    """Ids that end a text: those of generation_config.json, of config.json and of the tokenizer, all of them.

    Fine-tuning adds an end of turn to one of the three and often leaves the others as the base had them.
    """
    configs = [
        read_json(path / file, "") for file in ("generation_config.json", "config.json") if (path / file).is_file()
    ]
    configs += [item for config in configs for item in config.values() if isinstance(item, dict)]  # text_config
    named = [config.get("eos_token_id") for config in configs] + [tokenizer.eos_token_id]
    ids = [item for value in named for item in (value if isinstance(value, list) else [value])]
    return frozenset(item for item in ids if type(item) is int and item >= 0)
