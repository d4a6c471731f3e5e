"""Experts that are stored bit for bit, coded when they are loaded: a slot holds codes, as any expert's."""

from __future__ import annotations

from dataclasses import replace

import torch

from meswitch_cli.artifact.artifact import Artifact, value_of
from meswitch_cli.artifact.served import ServedCode, served_code, slot_settings
from meswitch_cli.artifact.weights import ArtifactWeights
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
    made = {
        name: _coded(artifact, entry, stored[name], base.read(entry.base), code)
        for name, entry in entries.items()
        if name in stored
    }
    return stored | made


def _coded(
    artifact: Artifact, entry: TensorEntry, delta: StoredDelta, own: torch.Tensor, code: ServedCode
) -> StoredDelta:
    """What a slot is given of one tensor that is stored bit for bit; `own` is the base's."""
    assert delta.exact is not None
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


class ServedWeights(ArtifactWeights):
    """What an engine makes of an artifact's expert: where that is stored bit for bit, base + dequantised code, fp32."""

    def __init__(self, artifact: Artifact, base: CheckpointWeights) -> None:
        super().__init__(artifact, base)
        self._code = served_code(artifact.manifest)

    def read(self, name: str) -> torch.Tensor:
        entry = self._entries.get(self.architecture.holder(name).name)
        if entry is None or not entry.exact:
            return super().read(name)
        delta = self.artifact.shard(entry.shard).delta(entry.name)
        own = self.base.read(entry.base)
        return value_of(_coded(self.artifact, entry, delta, own, self._code), entry, own)
