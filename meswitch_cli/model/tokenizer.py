"""A model's own tokenizer, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
