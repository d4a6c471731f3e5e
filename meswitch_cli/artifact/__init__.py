"""The format on disk: an artifact opened, checked and restored."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.artifact.manifest import Manifest, parse_manifest
    from meswitch_cli.artifact.restore import restore
    from meswitch_cli.artifact.weights import ArtifactWeights

__all__ = ["Artifact", "ArtifactWeights", "Manifest", "parse_manifest", "restore"]

__getattr__ = exporter(
    __name__,
    {
        "Artifact": "artifact",
        "Manifest": "manifest",
        "parse_manifest": "manifest",
        "restore": "restore",
        "ArtifactWeights": "weights",
    },
)
