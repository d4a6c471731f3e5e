"""Whether a checkpoint is the base that an artifact was made against."""

from __future__ import annotations

from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import short_fingerprint
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.architecture import architecture


def check_base_shapes(manifest: Manifest, base: Checkpoint) -> None:
    """Refuse, on metadata alone, a base that cannot be the artifact's.

    Raises:
        ArtifactError: family or a tensor's shape differs.
    """
    if base.model_type != manifest.model_type:
        raise ArtifactError(
            f"wrong base: the artifact was made against {manifest.base.id} ({manifest.model_type}), "
            f"{base.source.path} is {base.model_type}"
        )
    model = architecture(base.config, str(base.source.path))
    for entry in manifest.tensors:
        shape = model.parameters[entry.base].shape if entry.base in model.parameters else None
        if shape != entry.base_shape:
            raise ArtifactError(
                f"wrong base: the artifact was made against {manifest.base.id}, whose {entry.base!r} is "
                f"{list(entry.base_shape)}; {base.source.path} has {list(shape) if shape else 'no such tensor'}"
            )


def refuse_other_base(manifest: Manifest, found: str, path: object) -> None:
    """Compare fingerprints.

    Raises:
        ArtifactError: they differ.
    """
    own = manifest.base
    if found != own.fingerprint:
        raise ArtifactError(
            f"wrong base: {path} has fingerprint {short_fingerprint(found)}, the artifact was made against {own.id} "
            f"with {short_fingerprint(own.fingerprint)}; give that base, or compress the fine-tune against this one"
        )
