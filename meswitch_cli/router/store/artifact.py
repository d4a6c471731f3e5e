"""A router on disk: router.json, its tensors, a backend's own model, and the features for refitting."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from meswitch_cli import __version__
from meswitch_cli.artifact.disk import file_digest, refuse_occupied, whole_folder, write_atomically
from meswitch_cli.checkpoint.tensorfile import TensorFileError, read_header, read_tensor
from meswitch_cli.errors import RouterError
from meswitch_cli.router.backends.base import ReadableBase
from meswitch_cli.router.backends.contract import NULL, Backend, SavedBackend
from meswitch_cli.router.backends.registry import backend_class
from meswitch_cli.router.decide.model import RouterModel, expected_shapes
from meswitch_cli.router.decide.neighbours import NeighbourGate
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.store.features import FeatureStore
from meswitch_cli.router.store.known import KNOWN_FILE, KnownPrompt, read_known, to_json
from meswitch_cli.router.store.manifest import (
    FEATURES_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MODEL_FOLDER,
    TENSORS_FILE,
    RouterFile,
    RouterManifest,
    parse_manifest,
)


@dataclass(frozen=True)
class RouterArtifact:
    """A router's folder whose manifest and files have been checked; the backend is loaded when it is asked for."""

    path: Path
    manifest: RouterManifest
    model: RouterModel
    backend_tensors: Mapping[str, torch.Tensor]

    @classmethod
    def open(cls, path: Path) -> RouterArtifact:
        """Open a folder and check everything that routing needs.

        Raises:
            RouterError: it is no router, of another version, or a file is missing, damaged or not what it should be.
        """
        file = path / MANIFEST_FILE
        try:
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                raise RouterError(f"{file}: larger than a router.json can be")
            raw = file.read_bytes()
        except FileNotFoundError as error:
            raise RouterError(f"{path}: not a router: it has no {MANIFEST_FILE}") from error
        except OSError as error:
            raise RouterError(f"{file}: cannot be read: {error.strerror}") from error
        manifest = parse_manifest(raw, str(file))
        for entry in manifest.files:
            if entry.name == TENSORS_FILE or entry.name.startswith(f"{MODEL_FOLDER}/"):
                _check_file(path, entry)
        tensors = _read_tensors(path / TENSORS_FILE, manifest)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{manifest.backend}.")}
        return cls(path, manifest, RouterModel.from_parts(manifest.labels, tensors, manifest.numbers), own)

    @property
    def nbytes(self) -> int:
        """Bytes that routing needs on disk: manifest, tensors and the backend's model."""
        needed = (TENSORS_FILE, f"{MODEL_FOLDER}/")
        files = sum(entry.nbytes for entry in self.manifest.files if entry.name.startswith(needed))
        return files + (self.path / MANIFEST_FILE).stat().st_size

    def backend(self, base: ReadableBase | None) -> Backend:
        """Make the backend; `base` is the one that the router was trained for, where its backend reads one.

        Raises:
            RouterError: the backend's model cannot be loaded.
        """
        saved = SavedBackend(self.manifest.settings, self.backend_tensors, self.path / MODEL_FOLDER, base)
        return backend_class(self.manifest.backend).load(saved)

    def router(self, base: ReadableBase | None) -> Router:
        """The router of this folder, for a base that has been checked: `loading.open_router` checks it."""
        return Router(
            self.backend(base),
            self.model,
            fallback=self.manifest.fallback,
            sticky_margin=self.manifest.numbers["sticky_margin"],
            gate=self.manifest.gate,
        )

    def known(self) -> tuple[KnownPrompt, ...]:
        """The beginnings of the gate's prompts, in their order; none where they were left out or never were.

        Raises:
            RouterError: they are not what they should be.
        """
        entry = next((entry for entry in self.manifest.files if entry.name == KNOWN_FILE), None)
        if entry is None or not isinstance(self.model.gate, NeighbourGate):
            return ()
        _check_file(self.path, entry)
        return read_known(self.path / KNOWN_FILE, len(self.model.gate.owners))

    def store(self) -> FeatureStore:
        """The stored training features.

        Raises:
            RouterError: they are not there, or not what they should be.
        """
        entry = next((entry for entry in self.manifest.files if entry.name == FEATURES_FILE), None)
        if entry is None or not (self.path / FEATURES_FILE).is_file():
            raise RouterError(f"{self.path}: has no {FEATURES_FILE}; without it no expert can be added or removed")
        _check_file(self.path, entry)
        tensors = _load(self.path / FEATURES_FILE)
        labels, size = len(self.manifest.labels), self.model.scaling.mean.shape[0]
        count = len(tensors.get("labels", ()))
        shapes = {
            "features": (count, size),
            "targets": (count, labels),
            "labels": (count,),
            "parts": (count,),
            "digests": (count,),
        }
        if self.manifest.format_version > 1:
            shapes |= dict.fromkeys(("lengths", "fields", "groups"), (count,))
        _check_tensors(self.path / FEATURES_FILE, tensors, shapes)
        store = FeatureStore.from_tensors(tensors)
        if count and not (int(store.labels.min()) >= NULL and int(store.labels.max()) < labels):
            raise RouterError(f"{self.path / FEATURES_FILE}: a label that the router does not have")
        return store


def _check_file(folder: Path, entry: RouterFile) -> None:
    path = folder / entry.name
    if not path.is_file():
        raise RouterError(f"{path}: missing")
    if path.stat().st_size != entry.nbytes:
        raise RouterError(f"{path}: {path.stat().st_size} bytes, {MANIFEST_FILE} says {entry.nbytes}")
    if file_digest(path) != entry.sha256:
        raise RouterError(f"{path}: its SHA-256 is not the one in {MANIFEST_FILE}: changed or damaged")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return {name: read_tensor(info) for name, info in read_header(path).items()}
    except TensorFileError as error:
        raise RouterError(str(error)) from error


def _read_tensors(path: Path, manifest: RouterManifest) -> dict[str, torch.Tensor]:
    if TENSORS_FILE not in [entry.name for entry in manifest.files]:
        raise RouterError(f"{path}: missing from the files of {MANIFEST_FILE}")
    tensors = _load(path)
    saved = SavedBackend(manifest.settings, tensors, path.parent / MODEL_FOLDER)
    try:
        shapes = expected_shapes(len(manifest.labels), saved.number("size"), tensors)
    except RouterError as error:
        raise RouterError(f"{path}: {error}") from error
    shapes |= backend_class(manifest.backend).tensor_shapes(saved)
    _check_tensors(path, tensors, shapes)
    for name in ("scaling.scale", "gate.variances", "gate.deviations"):
        if name in tensors and not (tensors[name] > 0).all():
            raise RouterError(f"{path}: tensor {name!r} has values that are not above 0")
    return tensors


def _check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if set(tensors) != set(shapes):
        odd = sorted(set(tensors) ^ set(shapes))
        raise RouterError(f"{path}: tensor {odd[0]!r} is missing or does not belong there")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise RouterError(f"{path}: tensor {name!r} is {list(tensors[name].shape)}, must be {list(shape)}")
        if tensors[name].is_floating_point() and not torch.isfinite(tensors[name]).all():
            raise RouterError(f"{path}: tensor {name!r} has values that are not finite")


def write_router(
    out: Path,
    manifest: RouterManifest,
    model: RouterModel,
    backend: Backend | None,
    store: FeatureStore,
    *,
    known: Sequence[KnownPrompt] = (),
    source: RouterArtifact | None = None,
    report: Mapping[str, str] | None = None,
    plots: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> RouterArtifact:
    """Write a folder that appears whole or not at all.

    Args:
        manifest: its `files` are filled in here; reports are not among them, since two runs' latencies differ.
        known: the beginnings of the gate's prompts, in their order; none are written where it is empty.
        backend: gives tensors and model; None takes those of `source`, for a router that was only refitted.
        report: text of files by name; plots: bytes of files by name.

    Raises:
        RouterError: `out` is occupied by something else, or cannot be written.
    """
    out = out.expanduser().absolute()
    refuse_occupied(out, MANIFEST_FILE, force=force, what="a router", error=RouterError)
    with whole_folder(out, "training") as folder:
        own = backend.tensors() if backend is not None else dict(source.backend_tensors if source else {})
        _save(folder / TENSORS_FILE, model.tensors() | own)
        _save(folder / FEATURES_FILE, store.tensors())
        if known:
            write_atomically(folder / KNOWN_FILE, to_json(known).encode("utf-8", "replace"))
        if backend is not None:
            backend.save_model(folder / MODEL_FOLDER)
        elif source is not None and (source.path / MODEL_FOLDER).is_dir():
            shutil.copytree(source.path / MODEL_FOLDER, folder / MODEL_FOLDER)
        files = tuple(_describe(folder, path) for path in sorted(folder.rglob("*")) if path.is_file())
        for name, text in (report or {}).items():
            write_atomically(folder / name, text.encode())
        for name, data in (plots or {}).items():
            write_atomically(folder / name, data)
        done = replace(manifest, files=files, created_with=f"meswitch {__version__}", format_version=FORMAT_VERSION)
        raw = done.to_json().encode()
        parse_manifest(raw, str(out))  # what could not be read again does not replace what can
        write_atomically(folder / MANIFEST_FILE, raw)
    return RouterArtifact.open(out)


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    write_atomically(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _describe(folder: Path, path: Path) -> RouterFile:
    return RouterFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_digest(path))


def manifest_digest(folder: Path) -> str | None:
    """The digest of an expert's artifact; None for a folder that is a plain checkpoint.

    Raises:
        RouterError: there is no such folder.
    """
    from meswitch_cli.artifact.manifest import MANIFEST_FILE as ARTIFACT_MANIFEST

    if not folder.is_dir():
        raise RouterError(f"{folder}: no such folder; give an artifact of meswitch compress, or a checkpoint")
    file = folder / ARTIFACT_MANIFEST
    return file_digest(file) if file.is_file() else None
