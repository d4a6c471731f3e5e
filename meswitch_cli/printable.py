"""What manifests may call a model: checked where one is read, and before the work whose result will name it."""

from __future__ import annotations

from typing import Any

from meswitch_cli.errors import MeswitchError

MAX_NAME = 512


def is_name(value: Any) -> bool:
    """Whether a manifest may hold it as a name: a text of some characters, all of which print."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def require_name(name: str, where: object, error: type[MeswitchError]) -> None:
    """Refuse to make what could not be read again.

    Args:
        name: what the manifest would hold.
        where: whose name it is, for the message.
        error: what is raised.
    """
    if is_name(name):
        return
    odd = sorted({f"U+{ord(character):04X}" for character in name if not character.isprintable()})
    reason = f"characters that do not print ({', '.join(odd[:5])})" if odd else f"{len(name)} characters"
    raise error(f"{where}: the name {name[:80]!r} has {reason}, so no manifest can hold it: rename the folder")
