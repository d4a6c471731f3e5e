"""Codes or bit for bit, where a user leaves it open: the smaller of the two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import in_process
from compression.test_exact import exactly, sparse_pair, tensors_of

import meswitch_cli as meswitch
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.served import served_code
from meswitch_cli.compression import form
from meswitch_cli.compression.form import FormSizes, choose_form, form_sizes, in_smallest_form, leaves_form_open
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.architecture import Storage
from zoo.adapter import make_adapter
from zoo.tiny import Pair, make_pair

#: Weights enough that streams weigh more than their headers.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return sparse_pair(tmp_path_factory.mktemp("sparse"), share=0.05, **SHAPE)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A fine-tune that moves every weight, in fp32."""
    return make_pair(tmp_path_factory.mktemp("dense"), dtype=torch.float32, **SHAPE)


def aligned_pair(folder: Path) -> Pair:
    """A fine-tune that moves a block of each matrix, the same rows in the same columns, by one rounding step."""
    base, expert = sparse_pair(folder, share=0.0, **SHAPE)
    moved = {}
    for name, tensor in tensors_of(base).items():
        moved[name] = tensor.clone()
        if tensor.dim() == 2:
            block = moved[name][: len(tensor) // 4, ::4]
            block.copy_((block.float() + 2.0**-8 * tensor.float().std()).to(tensor.dtype))
    safetensors.torch.save_file(moved, expert / "model.safetensors", metadata={"format": "pt"})
    return base, expert


def compressed(pair: Pair, out: Path, *options: object) -> Artifact:
    run = in_process("compress", "--base", pair[0], "--expert", pair[1], "--out", out, "--keep-weak", *options)
    assert run.returncode == 0, run.stderr
    return Artifact.open(out)


@pytest.mark.parametrize("share", [0.02, 0.3], ids=["few", "many"])
def test_sizes_are_those_of_artifacts(share: float, tmp_path: Path) -> None:
    pair = sparse_pair(tmp_path / "pair", share=share, tie_word_embeddings=True, **SHAPE)
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "coded", CompressionSettings.with_defaults(), None)
    sizes = form_sizes(job.base, job.expert, job.plan, job.settings)
    assert sizes is not None
    compress(job, keep_weak=True)
    for found, artifact in ((sizes.code, Artifact.open(job.out)), (sizes.exact, exactly(pair, tmp_path / "exact"))):
        assert found == pytest.approx(sum(entry.nbytes for entry in artifact.manifest.tensors), rel=0.05)


def test_the_smaller_form_is_taken(sparse: Pair, dense: Pair, tmp_path: Path) -> None:
    artifact = compressed(sparse, tmp_path / "sparse")
    assert artifact.manifest.exact and all(entry.exact for entry in artifact.manifest.tensors)
    assert artifact.manifest.nbytes < compressed(sparse, tmp_path / "one", "--bits", 1).manifest.nbytes
    assert not compressed(dense, tmp_path / "dense").manifest.exact


@pytest.mark.parametrize(
    "options",
    [("--bits", 1), ("--rank", 0), ("--salient", 0), ("--embedding-bits", 2), ("--size", "1MB"), ("--group-size", 32)],
    ids=lambda options: options[0].removeprefix("--"),
)
def test_an_option_of_the_code_keeps_it(options: tuple[object, ...], sparse: Pair, tmp_path: Path) -> None:
    assert not compressed(sparse, tmp_path / "artifact", *options).manifest.exact


def test_what_is_said(sparse: Pair, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    run = in_process("compress", "--base", sparse[0], "--expert", sparse[1], "--out", out)
    said = next(line for line in run.stderr.splitlines() if "--bits 1" in line)
    assert "bit for bit" in said
    figures = json.loads(
        in_process("compress", "--base", sparse[0], "--expert", sparse[1], "--out", out, "--force", "--json").stdout
    )
    expected = figures["expected_bytes"]
    assert figures["settings"]["exact"] and expected["exact"] < expected["code"]
    looked = json.loads(in_process("inspect", "--base", sparse[0], "--expert", sparse[1], "--json").stdout)
    assert looked["sizes"] == expected
    assert "by itself" in in_process("inspect", "--base", sparse[0], "--expert", sparse[1]).stdout
    assert "coded when it is loaded: 4 bits in groups of 32" in in_process("inspect", out).stdout


def test_updates_at_random_places_are_served_by_finer_codes(tmp_path: Path) -> None:
    """No direction holds them: two bits would miss more than all of it. One with directions is served by two."""
    scattered = sparse_pair(tmp_path / "scattered", share=0.02, **SHAPE)
    alike = aligned_pair(tmp_path / "alike")
    for pair, bits in ((scattered, 4), (alike, 2)):
        for asked in ((), ("--exact",)):
            code = served_code(compressed(pair, tmp_path / f"{bits}{len(asked)}", *asked).manifest)
            assert code["linear"].bits == bits, pair
        told = served_code(compressed(pair, tmp_path / f"told-{bits}", "--exact", "--bits", 1).manifest)
        assert told["linear"].bits == 1


def test_what_no_code_serves_is_said(monkeypatch: pytest.MonkeyPatch, sparse: Pair, tmp_path: Path) -> None:
    monkeypatch.setattr(form, "MOST_ERROR", 0.0)
    job = prepare(str(sparse[0]), str(sparse[1]), tmp_path, CompressionSettings.with_defaults(exact=True), None)
    chosen, _ = choose_form(job, {"exact": True})
    assert any("restore it" in note for note in chosen.notes()) and chosen.settings.bits == 4


def test_a_program_gets_the_same(sparse: Pair, tmp_path: Path) -> None:
    made = meswitch.compress(sparse[0], sparse[1], tmp_path / "open")
    assert made.manifest.settings == compressed(sparse, tmp_path / "told").manifest.settings
    assert not meswitch.compress(sparse[0], sparse[1], tmp_path / "one", bits=1, keep_weak=True).manifest.exact


def test_what_has_no_weights_of_its_own_has_no_choice(sparse: Pair, tmp_path: Path) -> None:
    adapter = make_adapter(sparse[0], tmp_path / "adapter")
    job = prepare(str(sparse[0]), str(adapter), tmp_path / "out", CompressionSettings.with_defaults(), None)
    assert in_smallest_form(job) == (job, None)


def test_an_expert_that_is_its_base_has_no_smaller_form(sparse: Pair, tmp_path: Path) -> None:
    job = prepare(str(sparse[0]), str(sparse[0]), tmp_path / "out", CompressionSettings.with_defaults(), None)
    assert in_smallest_form(job)[0] == job


def test_which_options_leave_it_open() -> None:
    assert leaves_form_open({"bits": None, "exact": False, "seed": 3, "samples": 9, "calibration": "random"})
    for option in ({"rank": 0}, {"exact": True}, {"calibration": "0" * 64}, {"steps": "unbiased"}, {"size": 9}):
        assert not leaves_form_open(option), option


class Stopped(Exception):
    pass


@pytest.mark.parametrize("asked", [{}, {"exact": True}], ids=["open", "exact"])
def test_a_resumed_run_does_not_ask_the_weights_again(
    asked: dict[str, bool], sparse: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, expert = sparse
    own = tmp_path / "own"
    shutil.copytree(expert, own)
    out = tmp_path / "artifact"

    def chosen(options: dict[str, Any]) -> tuple[Job, FormSizes | None]:
        settings = CompressionSettings.with_defaults(**options)
        return choose_form(prepare(str(base), str(own), out, settings, None), options)

    def stop(what: str, nbytes: int, units: int) -> None:
        if units:
            raise Stopped

    job, sizes = chosen(asked)
    with pytest.raises(Stopped):
        compress(job, on_progress=stop)
    reads: list[str] = []
    read = Storage.read

    def noted(self: Storage, *arguments: Any) -> torch.Tensor:
        reads.append(self.name)
        return read(self, *arguments)

    monkeypatch.setattr(Storage, "read", noted)
    resumed, again = chosen(asked)
    assert (resumed.settings, resumed.notes(), again) == (job.settings, job.notes(), sizes) and not reads
    chosen({**asked, "seed": 1})
    assert reads  # of another work
    reads.clear()
    (own / "model.safetensors").touch()
    chosen(asked)
    assert reads  # of other weights, as far as one can tell without reading them
    monkeypatch.undo()
    compress(resumed)
    whole = prepare(str(base), str(expert), tmp_path / "whole", CompressionSettings.with_defaults(**asked), None)
    compress(choose_form(whole, asked)[0])
    assert Artifact.open(out).manifest.shards == Artifact.open(tmp_path / "whole").manifest.shards


def test_a_damaged_answer_is_told(sparse: Pair, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    (tmp_path / ".artifact.partial").mkdir()
    (tmp_path / ".artifact.partial" / "form.json").write_text('{"sizes": 3}')
    job = prepare(str(sparse[0]), str(sparse[1]), out, CompressionSettings.with_defaults(), None)
    with pytest.raises(ArtifactError, match=r"form\.json: damaged"):
        choose_form(job, {})
