"""A router on disk: router.json, its tensors, a backend's own model, and the features for refitting."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from meswitch_cli import __version__
from meswitch_cli.artifact.disk import disk_errors, exclusive, file_digest, write_atomically
from meswitch_cli.checkpoint.tensorfile import TensorFileError, read_header, read_tensor
from meswitch_cli.errors import RouterError
from meswitch_cli.router.backends.backend import Backend, load_backend, size_setting
from meswitch_cli.router.features import HiddenStates
from meswitch_cli.router.gates import MAX_DIRECTIONS
from meswitch_cli.router.manifest import (
    FEATURES_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MODEL_FOLDER,
    TENSORS_FILE,
    RouterFile,
    RouterManifest,
    parse_manifest,
)
from meswitch_cli.router.model import RouterModel, expected_shapes
from meswitch_cli.router.router import Router
from meswitch_cli.router.store import NULL, FeatureStore


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

    def backend(self, hidden_states: HiddenStates | None, tokenizer: Any) -> Backend:
        """Make the backend.

        Raises:
            RouterError: a probe is not given its base, or the backend's model cannot be loaded.
        """
        manifest = self.manifest
        return load_backend(
            manifest.backend,
            manifest.settings,
            self.backend_tensors,
            self.path / MODEL_FOLDER,
            hidden_states,
            tokenizer,
        )

    def router(self, hidden_states: HiddenStates | None, tokenizer: Any, *, strict: bool = False) -> Router:
        """The router of this folder."""
        return Router(
            self.backend(hidden_states, tokenizer),
            self.model,
            fallback=self.manifest.fallback,
            experts=self.manifest.experts,
            base_fingerprint=self.manifest.base_fingerprint,
            sticky_margin=self.manifest.numbers["sticky_margin"],
            strict=strict,
        )

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
    rank = len(tensors.get("gate.variances", ()))
    if not 1 <= rank <= MAX_DIRECTIONS:
        raise RouterError(f"{path}: the gate has {rank} directions, 1 to {MAX_DIRECTIONS} are possible")
    size = size_setting(manifest.settings, "size")
    shapes = expected_shapes(len(manifest.labels), size, rank)
    if manifest.backend == "tfidf":
        shapes["tfidf.idf"] = (size,)
    _check_tensors(path, tensors, shapes)
    for name in ("scaling.scale", "gate.variances"):
        if not (tensors[name] > 0).all():
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
    source: RouterArtifact | None = None,
    report: Mapping[str, str] | None = None,
    plots: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> RouterArtifact:
    """Write a folder that appears whole or not at all.

    Args:
        manifest: its `files` are filled in here; reports are not among them, since two runs' latencies differ.
        backend: gives tensors and model; None takes those of `source`, for a router that was only refitted.
        report: text of files by name; plots: bytes of files by name.

    Raises:
        RouterError: `out` is occupied by something else, or cannot be written.
    """
    out = out.expanduser().absolute()
    occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if occupied and not (force and (out / MANIFEST_FILE).is_file()):
        raise RouterError(f"{out}: in use; choose another output folder, or --force to replace a router")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    with exclusive(partial), disk_errors(out):
        for leftover in partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            own = backend.tensors() if backend is not None else dict(source.backend_tensors if source else {})
            _save(partial / TENSORS_FILE, model.tensors() | own)
            _save(partial / FEATURES_FILE, store.tensors())
            if backend is not None:
                backend.save_model(partial / MODEL_FOLDER)
            elif source is not None and (source.path / MODEL_FOLDER).is_dir():
                shutil.copytree(source.path / MODEL_FOLDER, partial / MODEL_FOLDER)
            files = tuple(_describe(partial, path) for path in sorted(partial.rglob("*")) if path.is_file())
            for name, text in (report or {}).items():
                write_atomically(partial / name, text.encode())
            for name, data in (plots or {}).items():
                write_atomically(partial / name, data)
            done = replace(manifest, files=files, created_with=f"meswitch {__version__}")
            raw = done.to_json().encode()
            parse_manifest(raw, str(out))  # what could not be read again does not replace what can
            write_atomically(partial / MANIFEST_FILE, raw)
            if out.exists():
                shutil.rmtree(out)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return RouterArtifact.open(out)


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    write_atomically(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _describe(folder: Path, path: Path) -> RouterFile:
    return RouterFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_digest(path))


def manifest_digest(folder: Path) -> str | None:
    """SHA-256 of an expert artifact's manifest; None for a folder that is a plain checkpoint.

    Raises:
        RouterError: there is no such folder.
    """
    from meswitch_cli.artifact.manifest import MANIFEST_FILE as ARTIFACT_MANIFEST

    if not folder.is_dir():
        raise RouterError(f"{folder}: no such folder; give an artifact of meswitch compress, or a checkpoint")
    file = folder / ARTIFACT_MANIFEST
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
