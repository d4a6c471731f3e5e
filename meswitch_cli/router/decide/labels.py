"""The names of experts in a router."""

from __future__ import annotations

from collections.abc import Iterable

from meswitch_cli.errors import RouterError
from meswitch_cli.names import BASE, RESERVED, check_name


def check_label(name: str, where: str) -> str:
    """The name, if an expert can have it: the same that serving asks of one.

    Raises:
        RouterError: it is reserved or of a form that a request cannot name.
    """
    if name in RESERVED:
        raise RouterError(f"{where}: {name!r} cannot be an expert's name; null marks prompts of no expert's domain")
    return check_name(name, where, RouterError)


def check_fallback(name: str, labels: Iterable[str]) -> str:
    """The name, if prompts can fall back to it.

    Raises:
        RouterError: it is neither the base nor one of the labels.
    """
    known = (BASE, *labels)
    if name not in known:
        raise RouterError(f"fallback {name!r} is not one of {', '.join(known)}")
    return name
