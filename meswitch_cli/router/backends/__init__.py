"""What turns prompts into features; the scores are a linear head on them, whatever the backend."""

from meswitch_cli.router.backends.registry import KINDS, Kind, backend_class

__all__ = ["KINDS", "Kind", "backend_class"]
