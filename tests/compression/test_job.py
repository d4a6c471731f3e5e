import ast
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.artifact.restore import restore
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.errors import ArtifactError, CheckpointError, UsageError
from zoo.tiny import Pair, make_pair

Make = Callable[..., Artifact]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _compress(pair: Pair, out: Path, force: bool = False, **settings: Any) -> Manifest:
    job = prepare(str(pair[0]), str(pair[1]), out, CompressionSettings(**({"salient": 4} | settings)), None)
    return compress(job, force=force)


class _Stop(Exception):
    """Ends a run from its progress callback."""


def _interrupted(pair: Pair, out: Path, after_units: int, **settings: Any) -> None:
    job = prepare(str(pair[0]), str(pair[1]), out, CompressionSettings(**({"salient": 4} | settings)), None)

    def stop(_what: str, _nbytes: int, units: int) -> None:
        if units >= after_units:
            raise _Stop

    with pytest.raises(_Stop):
        compress(job, on_progress=stop)
    assert not out.exists()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 1, "channel_scale": "rms"},
        {"bits": 1, "rank": 4, "calibration": RANDOM, "steps": "output-unbiased"},
        {"bits": 4, "group_size": 32},
        {"bits": 0.25, "rank": 4, "calibration": RANDOM, "steps": "output-unbiased"},
        {"bits": 1, "code": "trellis", "channel_scale": "rms"},
        {"calibration": RANDOM},
        {"calibrated": True},
        {"calibrated": True, "rounding": "feedback", "steps": "layerwise"},
        {"calibrated": True, "steps": "distill"},
    ],
    ids=lambda value: "-".join(str(item) for item in value.values()) or "default",
)
def test_two_runs_give_the_same_bytes(pair: Pair, make_artifact: Make, settings: dict[str, Any]) -> None:
    first = make_artifact(pair, out="first", **settings)
    second = make_artifact(pair, out="second", **settings)
    assert _bytes(first.path) == _bytes(second.path)


def test_artifact_holds_what_the_manifest_lists_and_nothing_else(pair: Pair, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    listed = {entry.name for entry in (*artifact.manifest.shards, *artifact.manifest.files)}
    listed |= {"meswitch.json", "README.md"}
    assert {path.name for path in artifact.path.iterdir()} == listed
    assert {"config.json", "tokenizer.json", "README.md"} <= listed
    text = "".join(path.read_text() for path in artifact.path.glob("*") if path.suffix in (".json", ".md"))
    assert str(pair[0].parent) not in text and os.path.expanduser("~") not in text  # noqa: PTH111
    assert not list(artifact.path.parent.glob(".*"))  # no partial work, no lock


def test_random_tokens_find_a_channel_of_large_activation(pair: Pair, tmp_path: Path) -> None:
    name, channel = "model.layers.1.self_attn.q_proj.weight", 41
    loud = []
    for source in pair:
        folder = tmp_path / source.name
        shutil.copytree(source, folder)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tensors["model.layers.1.input_layernorm.weight"][channel] = 50.0
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        loud.append(folder)
    kept = {}
    for calibration in (None, RANDOM):
        _compress((loud[0], loud[1]), tmp_path / str(calibration), calibration=calibration)
        artifact = Artifact.open(tmp_path / str(calibration))
        entry = next(entry for entry in artifact.manifest.tensors if entry.name == name)
        kept[calibration] = artifact.shard(entry.shard).delta(name).salient_index.tolist()
    assert channel in kept[RANDOM]
    assert channel not in kept[None]


def test_identical_expert_is_compressed_to_nothing(pair: Pair, tmp_path: Path) -> None:
    manifest = _compress((pair[0], pair[0]), tmp_path / "a")
    assert not manifest.tensors
    assert len(manifest.unchanged) == len(Checkpoint.open(str(pair[0])).tensors)


@pytest.mark.parametrize(
    ("calibration", "rank", "others"),
    [
        (None, 0, {}),
        (RANDOM, 0, {}),
        (RANDOM, 4, {}),
        (RANDOM, 4, {"bits": 0.25}),
        (None, 0, {"bits": 1, "code": "trellis"}),
    ],
)
@pytest.mark.parametrize("units", [0, 1, 2])
def test_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    pair: Pair, tmp_path: Path, units: int, calibration: str | None, rank: int, others: dict[str, Any]
) -> None:
    _compress(pair, tmp_path / "whole", calibration=calibration, rank=rank, **others)
    _interrupted(pair, tmp_path / "cut", units, calibration=calibration, rank=rank, **others)
    settings = CompressionSettings(salient=4, calibration=calibration, rank=rank, **others)
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "cut", settings, None)
    done: list[str] = []
    compress(job, on_progress=lambda what, nbytes, count: done.append(what))
    assert done.count("resumed") == units
    assert _bytes(tmp_path / "cut") == _bytes(tmp_path / "whole")


def test_interrupted_distillation_goes_on_with_the_same_numbers(
    pair: Pair, tmp_path: Path, calibration_file: Path, make_artifact: Make
) -> None:
    data = read_calibration(calibration_file)
    settings = CompressionSettings(salient=4, steps="distill", samples=4, sequence_length=32, calibration=data.sha256)
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "cut", settings, data)
    for moment in ("distill 3/40", "distill 27/40", "distill 40/40"):

        def stop(what: str, _nbytes: int, _units: int, moment: str = moment) -> None:
            if what == moment:
                raise _Stop

        with pytest.raises(_Stop):
            compress(job, on_progress=stop)
    seen: list[str] = []
    compress(job, on_progress=lambda what, nbytes, units: seen.append(what))
    assert "distill 20/40" not in seen  # went on from its last checkpoint
    whole = make_artifact(pair, out="whole", calibrated=True, steps="distill")
    assert _bytes(job.out) == _bytes(whole.path)


def test_changed_settings_are_refused_and_named(pair: Pair, tmp_path: Path) -> None:
    _interrupted(pair, tmp_path / "a", 1)
    with pytest.raises(ArtifactError, match=r"bits: 2 -> 4; embedding_bits: 2 -> 4.*--force"):
        _compress(pair, tmp_path / "a", bits=4, embedding_bits=4)
    manifest = _compress(pair, tmp_path / "a", force=True, bits=4, embedding_bits=4)
    assert {entry.bits for entry in manifest.tensors if entry.bits} == {4}


@pytest.mark.parametrize("which", [0, 1])
def test_changed_weights_are_refused_and_named(pair: Pair, tmp_path: Path, which: int) -> None:
    copies = (Path(shutil.copytree(pair[0], tmp_path / "base")), Path(shutil.copytree(pair[1], tmp_path / "expert")))
    _interrupted(copies, tmp_path / "a", 1)
    file = copies[which] / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    name = ("base", "expert")[which]
    with pytest.raises(ArtifactError, match=rf"{name}: tensor 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        _compress(copies, tmp_path / "a")


def test_touched_but_equal_weights_are_no_change(pair: Pair, tmp_path: Path) -> None:
    copies = (Path(shutil.copytree(pair[0], tmp_path / "base")), pair[1])
    _interrupted(copies, tmp_path / "a", 1)
    os.utime(copies[0] / "model.safetensors", (1, 1))
    _compress(copies, tmp_path / "a")
    _compress(pair, tmp_path / "b")
    assert _bytes(tmp_path / "a") == {**_bytes(tmp_path / "b")}


def test_existing_artifact_is_replaced_only_by_force(pair: Pair, tmp_path: Path) -> None:
    _compress(pair, tmp_path / "a")
    before = _bytes(tmp_path / "a")
    with pytest.raises(ArtifactError, match="--force"):
        _compress(pair, tmp_path / "a", bits=4)
    assert _bytes(tmp_path / "a") == before
    _compress(pair, tmp_path / "a", force=True, bits=4)
    assert _bytes(tmp_path / "a") != before


def test_kill_between_the_renames_of_a_replacement_keeps_the_old_artifact(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compress(pair, tmp_path / "a")
    before = _bytes(tmp_path / "a")
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target == tmp_path / "a":
            raise _Stop
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(_Stop):
        patched.setattr(Path, "rename", killed)
        _compress(pair, tmp_path / "a", force=True, bits=4)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ArtifactError, match="--force"):
        _compress(pair, tmp_path / "a", bits=1)
    assert _bytes(tmp_path / "a") == before


@pytest.mark.parametrize("rows", [250, 268])
def test_a_smaller_vocabulary_of_unchanged_rows(pair: Pair, tmp_path: Path, rows: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    model.resize_token_embeddings(rows)
    model.get_parameter("model.norm.weight").data += 0.5
    model.save_pretrained(tmp_path / "expert")
    shutil.copy(pair[0] / "tokenizer.json", tmp_path / "expert")
    manifest = _compress((pair[0], tmp_path / "expert"), tmp_path / "a")
    changed = {entry.name: entry.bits for entry in manifest.tensors}
    smaller = {"model.embed_tokens.weight": 0, "lm_head.weight": 0} if rows == 250 else {}
    assert changed == {"model.norm.weight": 0} | smaller
    artifact = Artifact.open(tmp_path / "a")
    assert len(list(artifact.verify())) == len(manifest.shards) + len(manifest.files)
    restore(artifact, Checkpoint.open(str(pair[0])), tmp_path / "back", dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_failed_replacement_keeps_the_old_artifact(pair: Pair, tmp_path: Path) -> None:
    _compress(pair, tmp_path / "a")
    before = _bytes(tmp_path / "a")
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "a", CompressionSettings(salient=1), None)

    def stop(*_: object) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        compress(job, force=True, on_progress=stop)
    assert _bytes(tmp_path / "a") == before


def test_foreign_folder_is_left_alone(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ArtifactError, match="in use by other files"):
            _compress(pair, tmp_path / "mine", force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_second_writer_is_refused(pair: Pair, tmp_path: Path) -> None:
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "a", CompressionSettings(salient=4), None)

    def second(*_: object) -> None:
        with pytest.raises(ArtifactError, match="another meswitch is writing here"):
            compress(job)

    compress(job, on_progress=second)


@pytest.mark.parametrize("which", ["base", "expert"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_nan_is_refused_and_named(tmp_path: Path, which: str, name: str) -> None:
    pair = make_pair(tmp_path)
    file = tmp_path / which / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[name].view(-1)[5] = float("nan")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        _compress(pair, tmp_path / "a")
    assert which in str(caught.value)


def test_more_salient_channels_than_inputs(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--salient 1000: model\.layers.* has only"):
        _compress(pair, tmp_path / "a", salient=1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits must be"),
        ({"bits": 0.2}, "bits must be 0.125, 0.25, 0.5, 1, 2 or 4, not 0.2"),
        ({"bits": 2, "code": "trellis"}, "trellis codes: bits must be"),
        ({"bits": 0.5, "group_size": 64}, "group size must be 0 for trellis codes"),
        ({"embedding_bits": 0.3}, "--embedding-bits"),
        ({"steps": "layerwise"}, "--steps layerwise needs calibration"),
        ({"steps": "distill"}, "--steps distill needs calibration"),
        ({"rounding": "feedback"}, "--rounding feedback needs calibration"),
        ({"group_size": 7}, "multiple of 32"),
        ({"rank": -1}, "rank must lie"),
        ({"embedding_bits": 8}, "--embedding-bits"),
        ({"samples": 0}, "--samples"),
        ({"steps": "magic"}, "--steps must be one of"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompressionSettings(**settings)


def test_full_disk_loses_at_most_one_layer(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compress(pair, tmp_path / "whole")
    real_fsync, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ArtifactError, match="the disk is full; free some space and run the same command again"):
            _compress(pair, tmp_path / "a")
    _compress(pair, tmp_path / "a")
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "whole")


def test_manifest_of_a_resumed_run_has_the_base_fingerprint(pair: Pair, tmp_path: Path) -> None:
    _interrupted(pair, tmp_path / "a", 2)
    _compress(pair, tmp_path / "a")
    whole = _compress(pair, tmp_path / "b")
    assert json.loads((tmp_path / "a" / "meswitch.json").read_text())["base"]["fingerprint"] == whole.base.fingerprint


def test_bf16_base_with_fp32_expert(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, dtype=torch.bfloat16, expert_dtype=torch.float32)
    manifest = _compress(pair, tmp_path / "a")
    assert manifest.dtype == "float32"
    assert all(
        entry.weight_error is not None and entry.weight_error < 0.5
        for entry in manifest.tensors
        if entry.kind == "linear"
    )


def test_config_entries_that_json_does_not_know(pair: Pair, tmp_path: Path) -> None:
    """Python writes them, transformers reads them, and no manifest may hold them."""
    expert = tmp_path / "expert"
    shutil.copytree(pair[1], expert)
    config = json.loads((expert / "config.json").read_text())
    config |= {"time_step_limit": [0.0, float("inf")], "odd": {"x": float("nan")}}
    (expert / "config.json").write_text(json.dumps(config))
    compress(prepare(str(pair[0]), str(expert), tmp_path / "art", CompressionSettings(salient=4), None))
    differences = Artifact.open(tmp_path / "art").manifest.config_differences
    assert differences["time_step_limit"] == [None, [0.0, "Infinity"]] and differences["odd"] == [None, {"x": "NaN"}]


def test_a_manifest_that_could_not_be_opened_is_not_published(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "art"
    compress(prepare(str(pair[0]), str(pair[1]), out, CompressionSettings(salient=4), None))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("meswitch_cli.compression.job.__version__", "1\u3000")
    with pytest.raises(ArtifactError, match="'created_with' is not a short printable string"):
        compress(prepare(str(pair[0]), str(pair[1]), out, CompressionSettings(salient=4, bits=4), None), force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["base", "a: b [final] #x", 'it\'s "that"', "*x", "模型 v2"])
def test_a_model_card_names_any_base(pair: Pair, tmp_path: Path, name: str) -> None:
    shutil.copytree(pair[0], tmp_path / name)
    _compress((tmp_path / name, pair[1]), tmp_path / "art")
    _, front, text = (tmp_path / "art" / "README.md").read_text().split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front)  # a folder's name is no repository's
    assert text.splitlines()[1] == f"# {pair[1].name}, as a 2-bit delta against {name}"
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("meswitch ")]
    assert [command[command.index("--base") + 1] for command in commands] == [name] * 3
    call = next(line for line in text.splitlines() if line.startswith("model = "))
    assert ast.literal_eval(call.partition("load")[2]) == (name, ".")
