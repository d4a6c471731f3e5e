"""The expert's own tokenizer, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meswitch_cli.errors import CheckpointError


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer without running code from the folder.

    Raises:
        CheckpointError: the folder has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a broken tokenizer
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {reason}") from error


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
