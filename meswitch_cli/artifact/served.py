"""How an engine codes an expert that is stored bit for bit: a slot holds codes, as any expert's.

An artifact's settings say it under `served`, by kind of tensor; it is chosen when the artifact is made, and costs no
bytes there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import TensorEntry, expected_entry
from meswitch_cli.errors import ArtifactError

SERVED = "served"
#: Kinds of tensors that a slot holds codes of.
CODED = ("linear", "embedding", "head")
#: Of artifacts that do not say.
DEFAULT = QuantizerSettings(bits=4, salient=0, group_size=32)
#: Code width of a delta that may be as large as the weight itself: it leaves 1 % of its energy as error, not 12 %.
UNRELATED_BITS = 4
_TYPES: dict[str, tuple[type, ...]] = {
    field.name: (int, float) if field.name == "bits" else (int,) if "int" in str(field.type) else (str, type(None))
    for field in fields(QuantizerSettings)
}

#: Settings by kind of tensor.
ServedCode = Mapping[str, QuantizerSettings]


def settings_of(code: ServedCode) -> dict[str, Any]:
    """A code as a manifest's settings say it."""
    return {SERVED: {kind: asdict(code[kind]) for kind in CODED}}


def served_code(manifest: Manifest) -> ServedCode:
    """The code of a slot for an artifact that is bit for bit.

    Raises:
        ArtifactError: its settings name a code that there is not.
    """
    told = manifest.settings.get(SERVED)
    if told is None:
        return dict.fromkeys(CODED, DEFAULT)
    where = f"the artifact of {manifest.expert.id}: settings: {SERVED}"
    if not isinstance(told, dict) or told.keys() != set(CODED):
        raise ArtifactError(f"{where}: expected an object with {', '.join(CODED)}")
    return {kind: _code(value, f"{where}: {kind}", kind) for kind, value in told.items()}


def slot_entries(manifest: Manifest) -> list[TensorEntry]:
    """What slots hold of an artifact's tensors: its entries, and codes in the place of streams.

    Raises:
        ArtifactError: as `served_code`.
    """
    if not any(entry.exact for entry in manifest.tensors):
        return list(manifest.tensors)
    code = served_code(manifest)
    return [_coded(entry, code) if entry.exact and entry.kind in CODED else entry for entry in manifest.tensors]


def _coded(entry: TensorEntry, code: ServedCode) -> TensorEntry:
    coded = expected_entry(slot_settings(entry, code), entry.shape, entry.base_shape)
    return replace(coded, name=entry.name, kind=entry.kind, base=entry.base, layer=entry.layer)


def slot_settings(entry: TensorEntry, code: ServedCode) -> QuantizerSettings:
    """Settings by which a slot's codes of a tensor are made."""
    own = code[entry.kind]
    unrelated = entry.kind == "head" and entry.base != entry.name
    return replace(own, bits=max(own.bits, UNRELATED_BITS), code=None) if unrelated else own


def _code(value: Any, where: str, kind: str) -> QuantizerSettings:
    if not isinstance(value, dict) or not value.keys() <= _TYPES.keys():
        raise ArtifactError(f"{where}: expected {', '.join(_TYPES)}")
    for name, found in value.items():
        if not isinstance(found, _TYPES[name]) or isinstance(found, bool):
            raise ArtifactError(f"{where}: {name} cannot be {found!r}")
    try:
        code = QuantizerSettings(**value)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from error
    if code.needs_gram or (code.rank and kind != "linear"):
        raise ArtifactError(f"{where}: a code that is made at loading has neither calibration nor directions here")
    return code
