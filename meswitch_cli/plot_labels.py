"""Names from outside as matplotlib's text."""

from __future__ import annotations


def plain_label(name: str) -> str:
    """A label that is drawn as it is: no `$` begins a formula, and no `_` keeps it out of the legend."""
    return f" {name}"[not name.startswith("_") :].replace("$", r"\$")
