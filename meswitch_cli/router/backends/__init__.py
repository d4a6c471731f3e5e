"""What turns prompts into features; the scores are a linear head on them, whatever the backend."""

from meswitch_cli.router.backends.backend import KINDS, Backend, Kind, load_backend

__all__ = ["KINDS", "Backend", "Kind", "load_backend"]
