"""What a program calls: the commands' work with the commands' defaults, without their output."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.library.artifacts import compress, load, restore
    from meswitch_cli.library.engine import Engine
    from meswitch_cli.library.serving import RunningServer, serve

__all__ = ["Engine", "RunningServer", "compress", "load", "restore", "serve"]

__getattr__ = exporter(
    __name__,
    {
        "compress": "artifacts",
        "load": "artifacts",
        "restore": "artifacts",
        "Engine": "engine",
        "RunningServer": "serving",
        "serve": "serving",
    },
)
