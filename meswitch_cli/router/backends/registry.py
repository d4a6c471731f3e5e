"""The backends there are. This file imports none of them, so that a command can list them at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from meswitch_cli.router.backends.contract import Backend

#: What router.json and the command line call a backend: the name of its module in this folder.
Kind = Literal["probe", "encoder", "tfidf", "lm"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def backend_class(kind: Kind) -> type[Backend]:
    """The class of a backend, which its module calls `BACKEND`."""
    found: type[Backend] = importlib.import_module(f"meswitch_cli.router.backends.{kind}").BACKEND
    return found
