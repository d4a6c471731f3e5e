"""Opening a router for a command: the probe's base is read and proven to be the right one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meswitch_cli.router.artifact import RouterArtifact
    from meswitch_cli.router.features import HiddenStates


def open_router(path: Path, base: str | None) -> tuple[RouterArtifact, HiddenStates | None, Any]:
    """The artifact, and the base's hidden states and tokenizer where its backend needs them.

    Raises:
        RouterError: it is no router, the base is missing, or it is another one.
    """
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.errors import RouterError
    from meswitch_cli.model.tokenizer import load_tokenizer
    from meswitch_cli.model.weights import CheckpointWeights
    from meswitch_cli.router.artifact import RouterArtifact
    from meswitch_cli.router.backends.backend import size_setting
    from meswitch_cli.router.features import BaseHiddenStates

    artifact = RouterArtifact.open(path)
    if artifact.manifest.backend != "probe":
        return artifact, None, None
    if base is None:
        raise RouterError(
            f"{path}: this router reads the hidden states of its base ({artifact.manifest.base_id}); give it: --base"
        )
    checkpoint = Checkpoint.open(base)
    found = CheckpointWeights(checkpoint).fingerprint
    if found != artifact.manifest.base_fingerprint:
        raise RouterError(
            f"the router was made for another base: {base} has fingerprint {found}, the router was made for "
            f"{artifact.manifest.base_id} with {artifact.manifest.base_fingerprint}"
        )
    layer = size_setting(artifact.manifest.settings, "layer")
    return artifact, BaseHiddenStates(base, layer), load_tokenizer(checkpoint.source.path, RouterError)
