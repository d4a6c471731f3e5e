"""Experts that are stored bit for bit, coded when they are loaded: a slot holds codes, as any expert's."""

from __future__ import annotations

from dataclasses import replace

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.delta.exact import decode
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import StoredDelta, TensorEntry, expected_entry
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.weights import CheckpointWeights

#: How an exact delta is coded for a slot. Most of its weights are zeros, for which no code has a value: the finest
#: codes and groups leave the least of them (docs/results/sparse.md).
SLOT_CODE = QuantizerSettings(bits=4, salient=0, group_size=32)


def slot_entry(entry: TensorEntry) -> TensorEntry:
    """The entry that tells of what a slot holds of a tensor."""
    if not entry.exact or entry.kind == "dense":
        return entry
    coded = expected_entry(SLOT_CODE, entry.shape, entry.base_shape)
    return replace(coded, name=entry.name, kind=entry.kind, base=entry.base, layer=entry.layer)


def coded(artifact: Artifact, stored: dict[str, StoredDelta], base: CheckpointWeights) -> dict[str, StoredDelta]:
    """What a slot is given of an artifact: streams as codes, and vectors as they are.

    Raises:
        ArtifactError: a stream does not go with the base.
    """
    entries = {entry.name: entry for entry in artifact.manifest.tensors if entry.exact}
    return {
        name: _coded(artifact, entries[name], delta, base) if name in entries else delta
        for name, delta in stored.items()
    }


def _coded(artifact: Artifact, entry: TensorEntry, delta: StoredDelta, base: CheckpointWeights) -> StoredDelta:
    assert delta.exact is not None
    own = base.read(entry.base)
    shared = own if entry.shape == entry.base_shape else own[: entry.rows]
    try:
        value = decode(delta.exact, shared)
        if entry.kind == "dense":
            return StoredDelta(value=value)
        result = quantize(shared, value, SLOT_CODE)
    except (ValueError, FloatingPointError) as error:
        raise ArtifactError(f"{artifact.path}: tensor {entry.name!r} does not go with its base: {error}") from error
    found = result[0] if result else StoredDelta()
    return replace(found, added_rows=delta.added_rows)
