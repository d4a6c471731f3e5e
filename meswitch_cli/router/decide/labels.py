"""The names of experts in a router."""

from __future__ import annotations

import re
from collections.abc import Iterable

from meswitch_cli.errors import RouterError
from meswitch_cli.names import BASE, RESERVED

_LABEL = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


def check_label(name: str, where: str) -> str:
    """The name, if an expert can have it.

    Raises:
        RouterError: it is reserved or of a form that a request cannot name.
    """
    if name in RESERVED:
        raise RouterError(f"{where}: {name!r} cannot be an expert's name; null marks prompts of no expert's domain")
    if not _LABEL.fullmatch(name):
        raise RouterError(
            f"{where}: {name[:80]!r} cannot be an expert's name: letters, digits, '_', '.' and '-', at most 64"
        )
    return name


def check_fallback(name: str, labels: Iterable[str]) -> str:
    """The name, if prompts can fall back to it.

    Raises:
        RouterError: it is neither the base nor one of the labels.
    """
    known = (BASE, *labels)
    if name not in known:
        raise RouterError(f"fallback {name!r} is not one of {', '.join(known)}")
    return name
