"""What a request can name: the base, an expert, whom the router chooses, and how much that may refuse."""

from __future__ import annotations

import re
from typing import Literal, get_args

from meswitch_cli.errors import MeswitchError, UsageError

#: The name under which the base itself is served.
BASE = "base"
#: The model name that asks for routing.
AUTO = "auto"
#: Names that no expert can have.
RESERVED = (BASE, AUTO)
#: How much a router refuses: `strict` all that is at all doubtful, `off` nothing.
GateMode = Literal["strict", "normal", "off"]
GATE_MODES: tuple[GateMode, ...] = get_args(GateMode)


#: A letter or a digit first, so that no name can be taken for an option or a path upwards.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,127}")


def check_name(name: str, where: str = "expert name", error: type[MeswitchError] = UsageError) -> str:
    """The name, if an expert can have it, on a command line, in a request and in a router alike.

    Args:
        where: whose name it is, for the message.

    Raises:
        error: it is empty, too long, has odd characters, or means something else already.
    """
    if name in RESERVED:
        raise error(f"{where}: {name!r} cannot be an expert's name: it has a meaning of its own; choose another")
    if not _NAME.fullmatch(name):
        raise error(
            f"{where}: {name[:80]!r} cannot be an expert's name: use letters, digits and any of - _ . / "
            "(at most 128, a letter or a digit first)"
        )
    return name
