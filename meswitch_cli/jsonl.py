"""JSONL: one JSON value a line. Read whole, with errors that name the line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch_cli.errors import MeswitchError
from meswitch_cli.textfile import read_text


@dataclass(frozen=True)
class JsonLines:
    """A file's values, each with its line's number, and the file's SHA-256."""

    values: tuple[tuple[int, Any], ...]
    sha256: str


def read_jsonl(path: Path, error: type[MeswitchError], holds: str, *, most_lines: int | None = None) -> JsonLines:
    """Read a file; empty lines are skipped, lines after the first `most_lines` too.

    Args:
        path: the file.
        error: what is raised where it cannot be used.
        holds: what it should hold, for messages: "a task's data".
        most_lines: None for all.

    Raises:
        MeswitchError: of the kind `error`: no such file, not UTF-8, a line that is not JSON or holds what is no text,
            or no line with data.
    """
    file = read_text(path, error, holds)
    values: list[tuple[int, Any]] = []
    for number, line in enumerate(file.lines[:most_lines], 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as reason:
            raise error(f"{path}: line {number}: not JSON: {reason}") from reason
        if "\\ud" in line.lower() and not _is_text(value):
            raise error(f"{path}: line {number}: binary data, not text: half of a surrogate pair")
        values.append((number, value))
    if not values:
        raise error(f"{path}: no line with data; {holds} is JSONL with one example a line")
    return JsonLines(tuple(values), hashlib.sha256(file.raw).hexdigest())


def _is_text(value: Any) -> bool:
    """Whether all of it can be written as UTF-8: JSON's escapes can say what is no character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
