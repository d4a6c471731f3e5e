"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from meswitch_cli.errors import UsageError


def user_path(text: str | Path) -> Path:
    """The path, with the home folder in place of a `~` at its beginning, which shells leave alone after `=`.

    Raises:
        UsageError: there is no such user.
    """
    try:
        return Path(text).expanduser() if str(text).startswith("~") else Path(text)
    except RuntimeError as error:
        raise UsageError(f"{text}: {error}") from error
