"""Packages that only some commands need."""

from __future__ import annotations

from importlib.util import find_spec

from meswitch_cli.errors import MeswitchError


def require_extra(extra: str, *modules: str) -> None:
    """Make sure that an extra's modules are installed.

    Raises:
        MeswitchError: one is missing; the message is the command that installs them all.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MeswitchError(f"{', '.join(missing)} not installed: pip install 'meswitch[{extra}]'")
