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
