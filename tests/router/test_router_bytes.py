"""What is written, byte for byte: routers made by hand, without any arithmetic that a processor could do otherwise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from meswitch_cli import __version__
from meswitch_cli.router.backends.contract import NULL
from meswitch_cli.router.backends.probe import Probe
from meswitch_cli.router.backends.tfidf import DIMENSIONS, Tfidf
from meswitch_cli.router.decide.gates import DistanceGate
from meswitch_cli.router.decide.head import Head, Scaling
from meswitch_cli.router.decide.model import Gate, RouterModel
from meswitch_cli.router.decide.neighbours import NeighbourGate
from meswitch_cli.router.decide.null_class import NullClassGate
from meswitch_cli.router.store.artifact import RouterArtifact, file_digest, write_router
from meswitch_cli.router.store.features import FeatureStore
from meswitch_cli.router.store.manifest import RouterManifest

LABELS = ("code", "maths")
#: SHA-256 of each file of a router of today.
RECORDED = {
    "probe": {
        "features.safetensors": "ebff513e4f5762bf81f25a70b55a16b6ecd440affdef485da5beab42a02eee42",
        "router.json": "58482b60d5b541675d69f505e81fafa329056458c3ce3a12483cea70577cf89e",
        "router.safetensors": "a80205b2dcea999d91300dcc85740c0ad242d72d940f5d484b4025c2e2b08623",
    },
    "tfidf": {
        "features.safetensors": "1eda09a95b47ae1e884ff19cdf6238f908e2fba7893002313074e6162b3503b0",
        "router.json": "8ff66e4b83b8cf01343c826c342f1551bc026f2933108c890683c12b0a4abf0a",
        "router.safetensors": "768726a6d9b00b6c613b2f6e5b92d4f56fd7546a86970869ce5379a7de729fb5",
    },
}
#: The same of format version 2, whose gate had no null class.
VERSION_2 = {
    "probe": {
        "features.safetensors": "ebff513e4f5762bf81f25a70b55a16b6ecd440affdef485da5beab42a02eee42",
        "router.json": "1006f9a1596a467d9a78a1c42b8279a2006795e7f306839de3f577783af48b9c",
        "router.safetensors": "bdc44d87baee778e607560b5b3771721392d9b59a7c4ffc5d396bd7739d03676",
    },
    "tfidf": {
        "features.safetensors": "1eda09a95b47ae1e884ff19cdf6238f908e2fba7893002313074e6162b3503b0",
        "router.json": "f0ca7fc8444c536f29aad73ce711b1a6253ac42532797525f221f581b9cfc6a1",
        "router.safetensors": "de67531228e763e773e1dce612865d2ac61b96d3dd7975561974e5ab244825bb",
    },
}
#: The same of format version 1 as meswitch 0.1.0 wrote it: such routers are out there and open as ever.
VERSION_1 = {
    "probe": {
        "features.safetensors": "95898e779afb6d82a39b52a8c2362d826f2cfa77b5ccc65c270aaa80d69a8d05",
        "router.json": "b3904c4838200868905806bff30df04684d5aaf83b4bc9e686a2358a41d3184e",
        "router.safetensors": "21d37142c0f174ef3569a2d2e12d60c8590eba90c3096ebb4cb814a14846c168",
    },
    "tfidf": {
        "features.safetensors": "b4626eb7acf62f3e4b04a20bbdc8f628248f691e6026755e5b071a0f251d1953",
        "router.json": "a263545b55fd78799dee1390bd91052e7095cf0347e82c9bb71b623968f18a58",
        "router.safetensors": "cab18bbbf6c8edec03367aa8216c59ad03459d609c0532675534b7ed0fe9f3f5",
    },
}


def numbered(*shape: int, start: float = 0.0) -> torch.Tensor:
    """0, 1/8, 2/8 and so on: exact in 16 bit too."""
    count = int(np.prod(shape))
    return (start + torch.arange(count) % 64 / 8).float().view(shape)


def distance_gate(size: int) -> DistanceGate:
    return DistanceGate(numbered(2, size), numbered(size, 3), numbered(3, start=1.0), 0.5, 5.25)


def neighbour_gate(size: int) -> NeighbourGate:
    return NeighbourGate(numbered(size, 3), numbered(4, 3), torch.tensor([0, 1, NULL, NULL]), 0.5, 0.375)


def null_class_gate(size: int) -> NullClassGate:
    near = neighbour_gate(size)
    null = Head(numbered(3, size, start=-1.0), numbered(3))
    parts = (near.directions, near.points, near.owners, near.threshold, near.strict_threshold)
    return NullClassGate(*parts, null=null, deviations=torch.tensor([0.125, 4.0]))


def made_by_hand(kind: str, gate_of: Callable[[int], Gate]) -> tuple[RouterManifest, RouterModel, Any, FeatureStore]:
    size = 6 if kind == "probe" else DIMENSIONS
    gate = gate_of(size)
    scaling = Scaling(numbered(size), numbered(size, start=1.0))
    model = RouterModel(LABELS, scaling, Head(numbered(2, size, start=-2.0), numbered(2)), gate, 1.5, 0.75)
    backend: Any = Tfidf(numbered(size, start=1.0).numpy(), max_tokens=64)
    if kind == "probe":
        backend = Probe(None, None, layer=2, size=size, max_tokens=64)  # type: ignore[arg-type]
    store = FeatureStore(
        numbered(5, size),
        torch.tensor([[1.0, 0], [0, 1], [0.25, 0.75], [0, 0], [0, 1]]),
        torch.tensor([0, 1, NULL, NULL, 1]),
        torch.tensor([0, 1, 0, 2, 3], dtype=torch.uint8),
        torch.tensor([11, -22, 33, -(1 << 62), 55]),
        torch.tensor([5, 600, 70, 8, 9]),
        torch.tensor([-1, -1, -1, 3, -1]),
        torch.tensor([-1, -1, -1, 2, -1]),
    )
    manifest = RouterManifest(
        labels=LABELS,
        experts={"code": "c" * 64, "maths": None},
        fallback="code",
        backend=kind,  # type: ignore[arg-type]
        settings=backend.settings(),
        base_id="owner/base" if kind == "probe" else None,
        base_fingerprint="sha256:" + "b" * 64 if kind == "probe" else None,
        numbers=model.numbers() | {"sticky_margin": 0.25},
        split={"train": {"prompts": 2, "null_prompts": 0, "sha256": "d" * 64}},
        training={"backend": kind, "seed": 3, "target_precision": 0.875},
        metrics={"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75, "prompts": 2}},
        files=(),
        created_with="",
    )
    return manifest, model, backend, store


def digests(folder: Path) -> dict[str, str]:
    """By file; the version of meswitch that wrote it stands in router.json and is left out."""
    version = f"meswitch {__version__}".encode()
    return {
        path.name: hashlib.sha256(path.read_bytes().replace(version, b"meswitch")).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("kind", ["probe", "tfidf"])
def test_a_router_s_bytes_are_those_of_its_format(kind: str, tmp_path: Path) -> None:
    manifest, model, backend, store = made_by_hand(kind, null_class_gate)
    written = write_router(tmp_path / "router", manifest, model, backend, store)
    assert digests(written.path) == RECORDED[kind]
    again = RouterArtifact.open(written.path)
    copied = write_router(tmp_path / "copy", again.manifest, again.model, None, again.store(), source=again)
    assert digests(copied.path) == RECORDED[kind]


@pytest.mark.parametrize("kind", ["probe", "tfidf"])
def test_a_router_of_format_version_2_opens_with_its_gate_of_neighbours(kind: str, tmp_path: Path) -> None:
    manifest, model, backend, store = made_by_hand(kind, neighbour_gate)
    old = write_router(tmp_path / "old", manifest, model, backend, store).path
    change_version(old, 2)
    assert digests(old) == VERSION_2[kind]
    opened = RouterArtifact.open(old)
    assert type(opened.model.gate) is NeighbourGate
    features = numbered(5, model.scaling.mean.shape[0])
    assert torch.equal(opened.model.distances(features), model.distances(features))
    copied = write_router(tmp_path / "copy", opened.manifest, opened.model, None, opened.store(), source=opened)
    assert copied.manifest.format_version == 3 and type(copied.model.gate) is NeighbourGate


@pytest.mark.parametrize("kind", ["probe", "tfidf"])
def test_a_router_of_format_version_1_opens_and_is_written_as_one_of_today(kind: str, tmp_path: Path) -> None:
    manifest, model, backend, store = made_by_hand(kind, distance_gate)
    old = write_router(tmp_path / "old", manifest, model, backend, store).path
    as_version_1(old)
    assert digests(old) == VERSION_1[kind]
    opened = RouterArtifact.open(old)
    features = numbered(5, model.scaling.mean.shape[0])
    assert torch.equal(opened.model.distances(features), model.distances(features))
    for mode in ("strict", "normal"):
        assert opened.model.distance_threshold(mode) == 5.25
    assert opened.model.distance_threshold("off") == float("inf")
    assert (opened.store().lengths == -1).all() and not opened.store().general_rows().any()
    copied = write_router(tmp_path / "copy", opened.manifest, opened.model, None, opened.store(), source=opened)
    assert copied.manifest.format_version == 3 and copied.manifest.numbers == opened.manifest.numbers
    assert torch.equal(copied.store().features, opened.store().features)


def change_version(folder: Path, version: int) -> None:
    file = folder / "router.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": version}, indent=1) + "\n")


def as_version_1(folder: Path) -> None:
    """Take out what version 1 did not have."""
    features = folder / "features.safetensors"
    tensors = safetensors.torch.load_file(features)
    kept = {name: tensors[name] for name in ("features", "targets", "labels", "parts", "digests")}
    features.write_bytes(safetensors.torch.save(kept))
    file = folder / "router.json"
    value = json.loads(file.read_text())
    value["format_version"] = 1
    value["settings"].pop("unit_length", None)
    entry = next(item for item in value["files"] if item["name"] == features.name)
    entry |= {"nbytes": features.stat().st_size, "sha256": file_digest(features)}
    file.write_text(json.dumps(value, indent=1) + "\n")
