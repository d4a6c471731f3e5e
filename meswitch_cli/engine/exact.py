"""Experts that are stored bit for bit, coded when they are loaded: a slot holds codes, as any expert's."""

from __future__ import annotations

from dataclasses import replace

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.served import ServedCode, served_code, slot_settings
from meswitch_cli.delta.exact import decode
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.stored import StoredDelta, TensorEntry
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.weights import CheckpointWeights


def coded(artifact: Artifact, stored: dict[str, StoredDelta], base: CheckpointWeights) -> dict[str, StoredDelta]:
    """What a slot is given of an artifact: streams as codes, and vectors as they are.

    Raises:
        ArtifactError: a stream does not go with the base, or its settings name a code that there is not.
    """
    code = served_code(artifact.manifest)
    entries = {entry.name: entry for entry in artifact.manifest.tensors if entry.exact}
    return {
        name: _coded(artifact, entries[name], delta, base, code) if name in entries else delta
        for name, delta in stored.items()
    }


def _coded(
    artifact: Artifact, entry: TensorEntry, delta: StoredDelta, base: CheckpointWeights, code: ServedCode
) -> StoredDelta:
    assert delta.exact is not None
    own = base.read(entry.base)
    shared = own if entry.shape == entry.base_shape else own[: entry.rows]
    try:
        value = decode(delta.exact, shared)
        if entry.kind == "dense":
            return StoredDelta(value=value)
        result = quantize(shared, value, slot_settings(entry, code))
    except (ValueError, FloatingPointError) as error:
        raise ArtifactError(f"{artifact.path}: tensor {entry.name!r} does not go with its base: {error}") from error
    found = result[0] if result else StoredDelta()
    return replace(found, added_rows=delta.added_rows)
