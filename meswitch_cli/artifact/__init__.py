"""The format on disk: an artifact opened, checked and restored."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.artifact.manifest import Manifest, parse_manifest
    from meswitch_cli.artifact.weights import ArtifactWeights

__all__ = ["Artifact", "ArtifactWeights", "Manifest", "parse_manifest"]

__getattr__ = exporter(
    __name__,
    {
        "Artifact": "artifact",
        "Manifest": "manifest",
        "parse_manifest": "manifest",
        "ArtifactWeights": "weights",
    },
)
