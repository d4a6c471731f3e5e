"""Artifacts on the Hugging Face Hub: found by name, fetched, published."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.hub.fetch import find_artifact, open_artifact, pull
    from meswitch_cli.hub.publish import Published, push

__all__ = ["Published", "find_artifact", "open_artifact", "pull", "push"]

__getattr__ = exporter(
    __name__,
    {"find_artifact": "fetch", "open_artifact": "fetch", "pull": "fetch", "Published": "publish", "push": "publish"},
)
