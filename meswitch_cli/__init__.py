"""meswitch: serve a family of fine-tuned language models from one base.

`import meswitch_cli as meswitch`; docs/python.md tells what there is.
"""

from typing import TYPE_CHECKING

from meswitch_cli.after_import import after_import
from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.engine.generate import Completion
    from meswitch_cli.errors import MeswitchError
    from meswitch_cli.hub.fetch import open_artifact, pull
    from meswitch_cli.hub.publish import push
    from meswitch_cli.library.artifacts import compress, load, restore
    from meswitch_cli.library.engine import Engine
    from meswitch_cli.library.serving import serve

__all__ = [
    "Artifact",
    "Completion",
    "Engine",
    "MeswitchError",
    "compress",
    "load",
    "open_artifact",
    "pull",
    "push",
    "restore",
    "serve",
]
__version__ = "0.1.0"

__getattr__ = exporter(
    __name__,
    {
        "Artifact": "artifact.artifact",
        "Completion": "engine.generate",
        "Engine": "library.engine",
        "MeswitchError": "errors",
        "compress": "library.artifacts",
        "load": "library.artifacts",
        "open_artifact": "hub.fetch",
        "pull": "hub.fetch",
        "push": "hub.publish",
        "restore": "library.artifacts",
        "serve": "library.serving",
    },
)


def _register_with_transformers() -> None:
    from meswitch_cli.library.quantizer import register

    register()


# So that `AutoModelForCausalLM.from_pretrained` loads an artifact, whichever of the two is imported first.
after_import("transformers.quantizers.auto", _register_with_transformers)
