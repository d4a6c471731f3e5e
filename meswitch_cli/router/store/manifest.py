"""router.json: everything read from one is checked before it is used."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from meswitch_cli.errors import RouterError
from meswitch_cli.names import GATE_MODES, GateMode
from meswitch_cli.printable import is_name
from meswitch_cli.router.backends.registry import KINDS, Kind, backend_class
from meswitch_cli.router.decide.labels import check_fallback, check_label
from meswitch_cli.router.store.membership import TrainedFor

#: Version 1 had one line of the distance, drawn from the experts' own prompts, and knew no general prompts; the gate of
#: version 2 had no null class.
FORMAT_VERSION = 3
READABLE = (1, 2, 3)
MANIFEST_FILE = "router.json"
TENSORS_FILE = "router.safetensors"
FEATURES_FILE = "features.safetensors"
MODEL_FOLDER = "model"
MAX_MANIFEST_BYTES = 16 << 20
MAX_LABELS = 4096
_FILE_NAME = re.compile(rf"({MODEL_FOLDER}/)?[A-Za-z0-9_][\w.-]{{0,127}}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
NUMBERS = ("temperature", "confidence_threshold", "distance_threshold", "sticky_margin")
#: One of the two, by the kind of the gate.
GATE_NUMBERS = ("strict_distance_threshold", "distance_residual")


@dataclass(frozen=True)
class RouterFile:
    """A file of the router's folder; only `router.safetensors` and `model/` are needed to route."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class RouterManifest:
    """The content of router.json.

    Attributes:
        labels: experts in the order of the head's rows; experts: their artifacts' manifest SHA-256, where known.
        backend: its kind; settings: what it needs to be made again.
        base_id, base_fingerprint: of the base whose hidden states the backend reads, None for one that reads none.
        numbers: temperature, thresholds and margin, by name (`NUMBERS`).
        split: prompts and hash of every part of the data.
        training: settings as given; metrics: of the test part.
    """

    labels: tuple[str, ...]
    experts: Mapping[str, str | None]
    fallback: str
    backend: Kind
    settings: Mapping[str, Any]
    base_id: str | None
    base_fingerprint: str | None
    numbers: Mapping[str, float]
    split: Mapping[str, Any]
    training: Mapping[str, Any]
    metrics: Mapping[str, Any]
    files: tuple[RouterFile, ...]
    created_with: str
    format_version: int = FORMAT_VERSION

    @property
    def gate(self) -> GateMode:
        """How much it refuses where nobody says."""
        given = self.training.get("gate")
        return cast(GateMode, given) if given in GATE_MODES else "normal"

    @property
    def trained_for(self) -> TrainedFor:
        return TrainedFor(self.experts, self.base_id, self.base_fingerprint)

    def to_json(self) -> str:
        value = {"format_version": self.format_version} | dataclasses.asdict(self)
        return json.dumps(value, indent=1, allow_nan=False) + "\n"


def parse_manifest(raw: bytes, where: str) -> RouterManifest:
    """Read and check a router.json.

    Raises:
        RouterError: it is not JSON, of another version, or says something a router cannot say.
    """
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RouterError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RouterError(f"{where}: not a JSON object")
    version = value.get("format_version")
    if isinstance(version, bool) or version not in READABLE:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise RouterError(
            f"{where}: format version {version!r}; this meswitch reads versions {READABLE[0]} to {READABLE[-1]}"
            + ("; upgrade meswitch" if newer else "")
        )

    def take(key: str, check: Callable[[Any], bool], expected: str) -> Any:
        if key not in value:
            raise RouterError(f"{where}: {key!r} is missing")
        if not check(value[key]):
            raise RouterError(f"{where}: {key!r} is not {expected}: {str(value[key])[:80]!r}")
        return value[key]

    labels = tuple(take("labels", lambda item: _is_names(item), f"a list of 2 to {MAX_LABELS} different names"))
    for label in labels:
        check_label(label, where)
    backend = take("backend", lambda item: item in KINDS, f"one of {', '.join(KINDS)}")
    base = take("base_fingerprint", _optional(_matches(_FINGERPRINT)), "a fingerprint")
    if (base is not None) != backend_class(backend).needs_base:
        raise RouterError(f"{where}: a base belongs to a backend that reads one, and to no other")
    return RouterManifest(
        labels=labels,
        experts=take("experts", lambda item: _is_experts(item, labels), "the labels with their artifacts' SHA-256"),
        fallback=check_fallback(take("fallback", is_name, "a name"), labels),
        backend=cast(Kind, backend),
        settings=take("settings", _is_object, "an object"),
        base_id=take("base_id", _optional(is_name), "a name"),
        base_fingerprint=base,
        numbers=_checked_numbers(take("numbers", _is_object, "an object"), where),
        split=take("split", _is_object, "an object"),
        training=take("training", _is_object, "an object"),
        metrics=take("metrics", _is_object, "an object"),
        files=tuple(_file(item, where) for item in take("files", _is_short_list, "a list of files")),
        created_with=take("created_with", is_name, "a name"),
        format_version=version,
    )


def _checked_numbers(numbers: Mapping[str, Any], where: str) -> Mapping[str, float]:
    given = [name for name in GATE_NUMBERS if name in numbers]
    if len(given) != 1:
        raise RouterError(f"{where}: numbers: needs one of {' and '.join(map(repr, GATE_NUMBERS))}")
    for name in (*NUMBERS, *given):
        value = numbers.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise RouterError(f"{where}: numbers: {name!r} is not a finite number from 0: {value!r}")
    if not numbers["temperature"] or not numbers.get("distance_residual", 1):
        raise RouterError(f"{where}: numbers: temperature and distance_residual must be above 0")
    return numbers


def _file(item: Any, where: str) -> RouterFile:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not _FILE_NAME.fullmatch(item["name"]):
        raise RouterError(f"{where}: files: {str(item)[:80]!r} does not name a file of the router's folder")
    nbytes, digest = item.get("nbytes"), item.get("sha256")
    if type(nbytes) is not int or nbytes < 0 or not _matches(_HEX64)(digest):
        raise RouterError(f"{where}: files: {item['name']}: size or SHA-256 is missing")
    return RouterFile(item["name"], nbytes, str(digest))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_short_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(item, str) for item in value)
        and 2 <= len(value) == len(set(value)) <= MAX_LABELS
    )


def _is_experts(value: Any, labels: tuple[str, ...]) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(labels)
        and all(item is None or _matches(_HEX64)(item) for item in value.values())
    )


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)
