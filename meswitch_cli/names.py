"""What a request can name: the base, an expert, whom the router chooses, and how much that may refuse."""

from __future__ import annotations

from typing import Literal, get_args

from meswitch_cli.errors import UsageError

#: The name under which the base itself is served.
BASE = "base"
#: The model name that asks for routing.
AUTO = "auto"
#: Names that no expert can have.
RESERVED = (BASE, AUTO)
#: How much a router refuses: `strict` all that is at all doubtful, `off` nothing.
GateMode = Literal["strict", "normal", "off"]
GATE_MODES: tuple[GateMode, ...] = get_args(GateMode)


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
