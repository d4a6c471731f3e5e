"""The OpenAI-compatible HTTP server over an engine: `create_app` of a `Service`, with `ServerSettings`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meswitch_cli.server.app import create_app
    from meswitch_cli.server.service import Service
    from meswitch_cli.server.settings import ServerSettings

__all__ = ["ServerSettings", "Service", "create_app"]

_MODULES = {"Service": "service", "ServerSettings": "settings", "create_app": "app"}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: clients read the settings alone, without a web framework."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
