"""What a request can name: the base, an expert, or whom the router chooses."""

from __future__ import annotations

from meswitch_cli.errors import UsageError

#: The name under which the base itself is served.
BASE = "base"
#: The model name that asks for routing.
AUTO = "auto"
#: Names that no expert can have.
RESERVED = (BASE, AUTO)


def check_name(name: str) -> None:
    """Refuse a name that no expert can have.

    Raises:
        UsageError: it is empty, too long, has odd characters, or means something else already.
    """
    plain = name.replace("-", "").replace("_", "").replace(".", "").replace("/", "")
    if not 0 < len(name) <= 128 or not plain.isascii() or not plain.isalnum():
        raise UsageError(f"expert name {name!r}: use letters, digits and any of - _ . / (at most 128)")
    if name in RESERVED:
        raise UsageError(f"expert name {name!r}: it has a meaning of its own; choose another")
