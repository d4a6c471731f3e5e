"""The folder of a router, whole and spoilt."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router import Router, open_router
from meswitch_cli.router.backends.base import ServedBase
from meswitch_cli.router.store.artifact import RouterArtifact, file_digest, manifest_digest, write_router
from meswitch_cli.router.train.data import gather
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import TrainedRouter, train_router

from .conftest import COUNTS, examples, save


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "router.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Spoil a tensor and make the manifest's hash agree, as somebody who means harm would."""
    file = folder / "router.safetensors"
    tensors = safetensors.torch.load_file(file)
    changed = change(tensors.pop(name))
    safetensors.torch.save_file(tensors if changed is None else tensors | {name: changed}, file)
    entry = {"name": file.name, "nbytes": file.stat().st_size, "sha256": file_digest(file)}
    edit(folder, lambda value: value.update(files=[entry]))


def test_two_runs_give_the_same_bytes(trained_probe: TrainedRouter, base: Path, tmp_path: Path) -> None:
    again = train_router(gather(examples(COUNTS)), TrainingSettings(max_tokens=64), base=str(base))
    first, second = save(trained_probe, tmp_path / "a").path, save(again, tmp_path / "b").path
    for name in ("router.json", "router.safetensors", "features.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_manifest_says_what_the_router_is(trained_probe: TrainedRouter, probe_folder: Path) -> None:
    artifact = RouterArtifact.open(probe_folder)
    manifest = artifact.manifest
    assert manifest.labels == ("code", "maths") and manifest.fallback == "base"
    assert manifest.base_fingerprint and manifest.settings["layer"] in (1, 2)
    assert {part: entry["prompts"] for part, entry in manifest.split.items()} == {
        "train": 88, "validation": 24, "calibration": 24, "test": 24
    }  # fmt: skip
    assert manifest.split["test"]["null_prompts"] == 12
    assert manifest.metrics["accuracy"]["value"] > 0.9
    needed = (probe_folder / "router.json").stat().st_size + (probe_folder / "router.safetensors").stat().st_size
    assert artifact.nbytes == needed < 250_000


def test_every_byte_of_the_tensors_is_checked(probe_folder: Path) -> None:
    file = probe_folder / "router.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(RouterError, match=r"its SHA-256 is not the one in router\.json"):
        RouterArtifact.open(probe_folder)
    file.write_bytes(raw[:-4])
    with pytest.raises(RouterError, match=r"router\.json says"):
        RouterArtifact.open(probe_folder)
    file.unlink()
    with pytest.raises(RouterError, match="missing"):
        RouterArtifact.open(probe_folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.update(format_version=4), "upgrade meswitch"),
        (lambda value: value.update(format_version="1"), "format version '1'"),
        (lambda value: value.pop("labels"), "'labels' is missing"),
        (lambda value: value.update(labels=["maths"]), "'labels' is not"),
        (lambda value: value.update(labels=["maths", "maths"]), "'labels' is not"),
        (lambda value: value.update(labels=["maths", "auto"]), "cannot be an expert's name"),
        (lambda value: value.update(experts={"maths": None}), "'experts' is not"),
        (lambda value: value.update(fallback="law"), "fallback 'law' is not one of base"),
        (lambda value: value.update(backend="pickle"), "'backend' is not one of"),
        (lambda value: value.update(base_fingerprint=None), "a base belongs to a backend that reads one"),
        (lambda value: value["settings"].update(size=97), "must be"),
        (lambda value: value["settings"].update(size=-1), "size is not a whole number"),
        (lambda value: value["numbers"].update(temperature=0), "must be above 0"),
        (lambda value: value["numbers"].update(temperature=True), "'temperature' is not a finite number"),
        (lambda value: value["numbers"].pop("distance_threshold"), "'distance_threshold' is not a finite number"),
        (lambda value: value["numbers"].pop("strict_distance_threshold"), "needs one of"),
        (lambda value: value["numbers"].update(distance_residual=1), "needs one of"),
        (lambda value: value["files"][0].update(name="../../etc/passwd"), "does not name a file of the router's"),
        (lambda value: value["files"][0].update(name="/etc/passwd"), "does not name a file of the router's"),
        (lambda value: value["files"][0].update(sha256="x"), "SHA-256 is missing"),
        (lambda value: value.update(files=[]), "missing from the files"),
    ],
)
def test_a_spoilt_manifest_is_refused(
    probe_folder: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(probe_folder, change)
    with pytest.raises(RouterError) as caught:
        RouterArtifact.open(probe_folder)
    assert said in str(caught.value)


@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"format_version": NaN}', b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(probe_folder: Path, raw: bytes) -> None:
    (probe_folder / "router.json").write_bytes(raw)
    with pytest.raises(RouterError, match=r"router\.json"):
        RouterArtifact.open(probe_folder)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("head.weight", lambda tensor: tensor[:, :-1].contiguous(), "must be [2, 96]"),
        ("head.weight", lambda tensor: tensor.fill_(float("nan")), "not finite"),
        ("head.bias", lambda tensor: None, "'head.bias' is missing or does not belong"),
        ("scaling.scale", lambda tensor: tensor.zero_(), "not above 0"),
        ("gate.directions", lambda tensor: tensor[:, :0].contiguous(), "the gate has 0 directions"),
        ("gate.directions", lambda tensor: tensor[:, :-1].contiguous(), "'gate.points' is"),
        ("gate.owners", lambda tensor: tensor.float().fill_(float("nan")), "not whole numbers"),
        ("gate.owners", lambda tensor: tensor.fill_(2), "a prompt of an expert that the router does not have"),
        ("gate.owners", lambda tensor: tensor[:-1].contiguous(), "'gate.points' is"),
    ],
)
def test_spoilt_tensors_are_refused(
    probe_folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None], said: str
) -> None:
    edit_tensors(probe_folder, name, change)
    with pytest.raises(RouterError) as caught:
        RouterArtifact.open(probe_folder)
    assert said in str(caught.value)


def test_a_probe_needs_its_base_and_hidden_states_of_its_size(
    probe_folder: Path, load_probe: Callable[[Path], Router]
) -> None:
    with pytest.raises(RouterError, match="give the base it was trained on"):
        open_router(probe_folder)

    class Wider:
        def pooled_hidden_states(self, token_ids: list[object], layer: int) -> torch.Tensor:
            return torch.zeros(len(token_ids), 128)

    tokenizer = load_probe(probe_folder).backend._tokenizer  # type: ignore[attr-defined]
    router = open_router(probe_folder, ServedBase(Wider(), tokenizer))  # type: ignore[arg-type]
    with pytest.raises(RouterError, match="trained on another base"):
        router.route("two plus two")


def test_what_is_no_router_is_refused_and_kept(tmp_path: Path, trained_probe: TrainedRouter) -> None:
    with pytest.raises(RouterError, match=r"not a router: it has no router\.json"):
        RouterArtifact.open(tmp_path)
    (tmp_path / "notes.txt").write_text("keep me")
    for force in (False, True):
        with pytest.raises(RouterError, match="in use"):
            write_router(
                tmp_path, trained_probe.manifest, trained_probe.router.model, None, trained_probe.store, force=force
            )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_write_that_fails_leaves_the_old_router(
    trained_probe: TrainedRouter, probe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in probe_folder.iterdir()}

    def fail(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trained_probe.backend, "save_model", fail)
    router = trained_probe.router
    with pytest.raises(KeyboardInterrupt):
        write_router(
            probe_folder, trained_probe.manifest, router.model, trained_probe.backend, trained_probe.store, force=True
        )
    assert {path.name: path.read_bytes() for path in probe_folder.iterdir()} == before
    assert not list(probe_folder.parent.glob(".*"))


def test_features_are_checked_when_they_are_needed(probe_folder: Path) -> None:
    file = probe_folder / "features.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    artifact = RouterArtifact.open(probe_folder)  # routing does not need them
    with pytest.raises(RouterError, match="changed or damaged"):
        artifact.store()
    file.unlink()
    with pytest.raises(RouterError, match="no expert can be added or removed"):
        artifact.store()


def test_manifest_digest_of_an_expert(tmp_path: Path) -> None:
    assert manifest_digest(tmp_path) is None
    (tmp_path / "meswitch.json").write_bytes(b"{}")
    assert manifest_digest(tmp_path) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(RouterError, match="no such folder"):
        manifest_digest(tmp_path / "nothing")


def test_a_manifest_that_could_not_be_read_replaces_none(trained_probe: TrainedRouter, probe_folder: Path) -> None:
    before = (probe_folder / "router.json").read_bytes()
    odd = dataclasses.replace(trained_probe.manifest, base_id="a\u3000base")
    router = trained_probe.router
    with pytest.raises(RouterError, match="'base_id' is not a name"):
        write_router(probe_folder, odd, router.model, router.backend, trained_probe.store, force=True)
    assert (probe_folder / "router.json").read_bytes() == before
    assert RouterArtifact.open(probe_folder).manifest.base_id == trained_probe.manifest.base_id


def test_a_base_whose_name_does_not_print_is_refused_before_the_work(base: Path, tmp_path: Path) -> None:
    odd = tmp_path / "ba\u00adse"
    shutil.copytree(base, odd)

    def progress(what: str, done: int, total: int) -> None:
        raise AssertionError(what)

    with pytest.raises(RouterError, match="do not print \\(U\\+00AD\\)"):
        train_router(gather(examples(COUNTS)), TrainingSettings(), base=str(odd), on_progress=progress)
