"""A JSON object of a checkpoint's folder, or what is wrong with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meswitch_cli.checkpoint.tensorfile import is_lfs_pointer
from meswitch_cli.errors import CheckpointError


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object, or say what is wrong with the file."""
    raw = b""
    try:
        raw = path.read_bytes()
        value = json.loads(raw)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {hint}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(raw):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`") from error
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value
