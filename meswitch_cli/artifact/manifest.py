"""`meswitch.json`: what an artifact holds. Everything read from one is checked before it is used.

The format is described in docs/artifact.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from meswitch_cli.checkpoint.weight_files import ARTIFACT_FILE
from meswitch_cli.delta.codes import CODES, RATES, TRELLIS_VERSION, CodeName
from meswitch_cli.delta.low_rank import FACTOR_BITS
from meswitch_cli.delta.stored import PARTS, TensorEntry
from meswitch_cli.errors import ArtifactError
from meswitch_cli.printable import is_name

#: The newest version of the format; what needs only an older one is written as that, which older readers know.
FORMAT_VERSION = max(TRELLIS_VERSION, *(part.version for part in PARTS), *(code.version for code in CODES.values()))
MANIFEST_FILE = ARTIFACT_FILE
MAX_MANIFEST_BYTES = 64 << 20
_MAX_DIMENSION = 1 << 26
_MAX_NUMEL = 1 << 36
_MAX_BYTES = 1 << 44
_SHARD_NAME = re.compile(r"delta-(\d{5})-of-(\d{5})\.safetensors")
#: A file beside the shards: in the folder itself, or where transformers keeps further chat templates.
SIDE_FILE_NAME = re.compile(r"(additional_chat_templates/)?[A-Za-z0-9_][\w.-]{0,127}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
#: Members of a tensor's entry that older versions of the format do not have.
_MEMBERS_SINCE = {2: ("rank",), 3: ("code", "taps", "states"), 4: ("factor_bits", "exact")}
KINDS = ("linear", "embedding", "head", "dense")


@dataclass(frozen=True)
class ModelReference:
    """A model the artifact speaks of: what it is called, its Hub revision if known, its tensors' fingerprint."""

    id: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: its bytes and their SHA-256."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `meswitch.json`.

    `settings` are the compression settings as given, for people and for resuming; readers need only `tensors`.
    `unchanged` lists the expert's tensors that equal the base's and are not stored.
    """

    base: ModelReference
    expert: ModelReference
    model_type: str
    num_layers: int
    dtype: str
    settings: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    unchanged: tuple[str, ...]
    shards: tuple[FileEntry, ...]
    files: tuple[FileEntry, ...]
    config_differences: Mapping[str, Any]
    created_with: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def exact(self) -> bool:
        """Whether it stands for its expert bit for bit."""
        return bool(self.settings.get("exact")) or any(entry.exact for entry in self.tensors)

    @property
    def format_version(self) -> int:
        return max((entry.version for entry in self.tensors), default=1)

    def to_json(self) -> str:
        """The manifest's file."""
        value = {"format_version": self.format_version} | dataclasses.asdict(self)
        unknown = [name for version, names in _MEMBERS_SINCE.items() if version > self.format_version for name in names]
        for entry in value["tensors"]:
            for name in unknown:
                del entry[name]
        return json.dumps(value, indent=1, sort_keys=False) + "\n"


def mean_errors(entries: Iterable[TensorEntry]) -> dict[str, float | None]:
    """`weight_error` and `output_error` of tensors together, weighted by their deltas' energy; None where no tensor
    has one."""
    items = list(entries)
    result: dict[str, float | None] = {}
    for name in ("weight_error", "output_error"):
        pairs = [(getattr(item, name), item.delta_energy) for item in items]
        known = [(error, energy) for error, energy in pairs if error is not None and energy]
        total = sum(energy for _, energy in known)
        result[name] = sum(error * energy for error, energy in known) / total if total else None
    return result


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        ArtifactError: it is not JSON, of another version, or says something an artifact cannot say.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{where}: {len(raw)} bytes, more than a manifest can have")
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not valid JSON: {error}") from error
    fields = _Fields(value, where)
    version = fields.size("format_version")
    if not 1 <= version <= FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: format version {version}; this meswitch reads 1 to {FORMAT_VERSION}"
            + ("; upgrade meswitch" if version > FORMAT_VERSION else "")
        )
    manifest = Manifest(
        base=_model_reference(fields.object("base")),
        expert=_model_reference(fields.object("expert")),
        model_type=fields.string("model_type"),
        num_layers=fields.size("num_layers"),
        dtype=fields.choice("dtype", ("bfloat16", "float16", "float32")),
        settings=fields.object("settings").value,
        tensors=tuple(_tensor_entry(item, version) for item in fields.objects("tensors")),
        unchanged=tuple(fields.strings("unchanged")),
        shards=tuple(_file_entry(item, _SHARD_NAME) for item in fields.objects("shards")),
        files=tuple(_file_entry(item, SIDE_FILE_NAME) for item in fields.objects("files")),
        config_differences=fields.object("config_differences").value,
        created_with=fields.string("created_with"),
    )
    _check_consistency(manifest, where)
    return manifest


def _check_consistency(manifest: Manifest, where: str) -> None:
    names = [entry.name for entry in manifest.tensors] + list(manifest.unchanged)
    if len(set(names)) != len(names):
        raise ArtifactError(f"{where}: a tensor is listed twice")
    files = [entry.name for entry in (*manifest.shards, *manifest.files)]
    if len(set(files)) != len(files) or MANIFEST_FILE in files:
        raise ArtifactError(f"{where}: a file is listed twice")
    expected = [shard_name(index, len(manifest.shards)) for index in range(len(manifest.shards))]
    if [shard.name for shard in manifest.shards] != expected:
        raise ArtifactError(f"{where}: shards are not numbered 1 to {len(manifest.shards)}")
    for entry in manifest.tensors:
        if entry.shard not in expected:
            raise ArtifactError(f"{where}: tensor {entry.name!r} is in shard {entry.shard!r}, which is not listed")


def shard_name(index: int, count: int) -> str:
    """File name of the shard with this index, from 0."""
    return f"delta-{index + 1:05d}-of-{count:05d}.safetensors"


def is_shard_name(name: str) -> bool:
    return bool(_SHARD_NAME.fullmatch(name))


def _model_reference(fields: _Fields) -> ModelReference:
    return ModelReference(
        fields.string("id"), fields.optional_string("revision"), fields.matching("fingerprint", _FINGERPRINT)
    )


def _file_entry(fields: _Fields, pattern: re.Pattern[str]) -> FileEntry:
    return FileEntry(
        fields.matching("name", pattern), fields.size("nbytes", _MAX_BYTES), fields.matching("sha256", _HEX64)
    )


def _tensor_entry(fields: _Fields, version: int) -> TensorEntry:
    kind = fields.choice("kind", KINDS)
    layer = None if fields.value.get("layer") is None else fields.size("layer")
    entry = TensorEntry(
        name=fields.string("name"),
        kind=kind,
        shape=fields.shape("shape"),
        base=fields.string("base"),
        base_shape=fields.shape("base_shape"),
        layer=layer,
        shard=fields.matching("shard", _SHARD_NAME),
        nbytes=fields.size("nbytes", _MAX_BYTES),
        bits=fields.rate("bits") if version > 2 else fields.size("bits", max(CODES)),
        code=fields.choice("code", get_args(CodeName)) if version > 2 else "scalar",
        taps=fields.whole_numbers("taps") if version > 2 else (),
        states=fields.size("states") if version > 2 else 0,
        salient=fields.size("salient"),
        group_size=fields.size("group_size"),
        channel_scale=fields.boolean("channel_scale"),
        rank=fields.size("rank") if version > 1 else 0,
        factor_bits=fields.size("factor_bits") if version > 3 else FACTOR_BITS,
        exact=fields.size("exact", _MAX_BYTES) if version > 3 else 0,
        added_rows=fields.size("added_rows"),
        delta_energy=fields.optional_number("delta_energy"),
        weight_error=fields.optional_number("weight_error"),
        output_error=fields.optional_number("output_error"),
    )
    problem = entry.problem()
    if problem:
        raise ArtifactError(f"{fields.where}: tensor {entry.name!r}: {problem}")
    return entry


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class _Fields:
    """A JSON object whose members are read with a check of their type."""

    raw: Any
    where: str

    @property
    def value(self) -> dict[str, Any]:
        if not isinstance(self.raw, dict):
            raise ArtifactError(f"{self.where}: not an object")
        return self.raw

    def _get(self, key: str) -> Any:
        if key not in self.value:
            raise ArtifactError(f"{self.where}: {key!r} is missing")
        return self.value[key]

    def _fail(self, key: str, expected: str) -> ArtifactError:
        return ArtifactError(f"{self.where}: {key!r} is not {expected}: {str(self._get(key))[:80]!r}")

    def size(self, key: str, limit: int = _MAX_DIMENSION) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            raise self._fail(key, f"a whole number from 0 to {limit}")
        return value

    def rate(self, key: str) -> float:
        value = self._get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= max(RATES):
            raise self._fail(key, f"a number from 0 to {max(RATES)}")
        return value if isinstance(value, int) or value != int(value) else int(value)

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        values = self._list(key)
        if not all(type(item) is int and 0 <= item <= _MAX_DIMENSION for item in values) or len(values) > 64:
            raise self._fail(key, "a list of whole numbers")
        return tuple(values)

    def boolean(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def string(self, key: str) -> str:
        value = self._get(key)
        if not is_name(value):
            raise self._fail(key, "a short printable string")
        return str(value)

    def optional_string(self, key: str) -> str | None:
        return None if self._get(key) is None else self.string(key)

    def matching(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.string(key)
        if not pattern.fullmatch(value):
            raise self._fail(key, f"of the form {pattern.pattern}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.string(key)
        if value not in allowed:
            raise self._fail(key, f"one of {', '.join(allowed)}")
        return value

    def optional_number(self, key: str) -> float | None:
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self._fail(key, "a finite number")
        return float(value)

    def shape(self, key: str) -> tuple[int, ...]:
        value = self._get(key)
        sizes = isinstance(value, list) and len(value) <= 6 and all(type(item) is int for item in value)
        if not sizes or not all(0 < item <= _MAX_DIMENSION for item in value) or math.prod(value) > _MAX_NUMEL:
            raise self._fail(key, "a shape")
        return tuple(value)

    def object(self, key: str) -> _Fields:
        fields = _Fields(self._get(key), f"{self.where}: {key}")
        _ = fields.value
        return fields

    def objects(self, key: str) -> list[_Fields]:
        return [_Fields(item, f"{self.where}: {key}[{index}]") for index, item in enumerate(self._list(key))]

    def strings(self, key: str) -> list[str]:
        values = self._list(key)
        if not all(isinstance(item, str) and 0 < len(item) <= 512 for item in values):
            raise self._fail(key, "a list of strings")
        return values

    def _list(self, key: str) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list) or len(value) > 1_000_000:
            raise self._fail(key, "a list")
        return value
