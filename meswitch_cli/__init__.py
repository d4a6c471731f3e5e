"""meswitch: serve a family of fine-tuned language models from one base."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.library import compress, restore

__all__ = ["Artifact", "compress", "restore"]
__version__ = "0.1.0"

__getattr__ = exporter(__name__, {"Artifact": "artifact.artifact", "compress": "library", "restore": "library"})
