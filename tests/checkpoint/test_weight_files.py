"""The files that a folder's weights lie in are those that transformers loads; what does not agree is named."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from meswitch_cli.checkpoint.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from meswitch_cli.errors import CheckpointError
from zoo.tiny import make_pair

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards, other than the one in a single file."""
    return make_pair(tmp_path_factory.mktemp("sharded"), seed=3, max_shard_size="90KB")[1]


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    """A model in one file."""
    return Path(shutil.copytree(pair[1], tmp_path / "model"))


def _same_as_transformers(folder: Path) -> bool:
    """Whether every tensor that is read here is the one that transformers loads."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    checkpoint = Checkpoint.open(str(folder))
    return all(torch.equal(checkpoint.read(name), loaded[name]) for name in checkpoint.tensors)


def _add_shards(folder: Path, sharded: Path) -> None:
    for path in sharded.glob("model*"):
        shutil.copy(path, folder)


@pytest.mark.parametrize("shards_left", [True, False])
def test_one_file_is_read_before_the_index_of_an_earlier_save(folder: Path, sharded: Path, shards_left: bool) -> None:
    _add_shards(folder, sharded)
    for path in folder.glob("model-*") if not shards_left else ():
        path.unlink()
    assert _same_as_transformers(folder)
    note = Checkpoint.open(str(folder)).notes[0]
    assert SINGLE_FILE in note and INDEX_FILE in note and "model-00001-of" in note


def test_an_index_that_names_the_one_file_is_no_contradiction(folder: Path) -> None:
    names = Checkpoint.open(str(folder)).tensors
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, SINGLE_FILE)}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert Checkpoint.open(str(folder)).notes == ()


def test_a_broken_index_beside_the_one_file_does_not_matter(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("{")
    assert _same_as_transformers(folder)
    assert INDEX_FILE in Checkpoint.open(str(folder)).notes[0]


def test_a_file_named_in_the_config_is_read(folder: Path, sharded: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "other.safetensors")
    _add_shards(folder, sharded)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert _same_as_transformers(folder)
    for name, message in (("../x.safetensors", "beside it"), ("x.bin", "beside it"), ("x.safetensors", "not there")):
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(str(folder))


def test_a_tensor_in_two_shards_is_the_last_ones(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    first, last = (sorted(folder.glob("model-*.safetensors"))[index] for index in (0, -1))
    doubled = next(iter(safetensors.torch.load_file(first).items()))
    stale = {doubled[0]: doubled[1] * 2}
    safetensors.torch.save_file(safetensors.torch.load_file(last) | stale, last, {"format": "pt"})
    assert _same_as_transformers(folder)
    checkpoint = Checkpoint.open(str(folder))
    assert torch.equal(checkpoint.read(doubled[0]), stale[doubled[0]])
    assert f"1 tensors are in more than one file, the first is {doubled[0]!r}" in checkpoint.notes[0]


def test_an_index_that_disagrees_with_its_files_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = json.loads((folder / INDEX_FILE).read_text())
    files = sorted(set(index["weight_map"].values()))
    right = Counter(index["weight_map"].values()).most_common(1)[0][0]
    moved, dropped = [name for name, file in index["weight_map"].items() if file == right][:2]
    del index["weight_map"][dropped]
    index["weight_map"][moved] = next(file for file in files if file != right)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert _same_as_transformers(folder)
    notes = Checkpoint.open(str(folder)).notes
    assert f"{right} holds it" in notes[0] and repr(moved) in notes[0]
    assert "1 tensors in its files are not listed" in notes[1] and repr(dropped) in notes[1]


def test_a_missing_tensor_is_blamed_on_the_index_that_promises_it(sharded: Path, tmp_path: Path) -> None:
    from meswitch_cli.model.matching import make_plan

    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = safetensors.torch.load_file(shard)
    gone = sorted(tensors)[0]
    del tensors[gone]
    safetensors.torch.save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing, the first is '{gone}'.*{INDEX_FILE}.*no file holds it"):
        make_plan(Checkpoint.open(str(folder)), Checkpoint.open(str(folder)))


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "adapter_model.safetensors"]
)
def test_other_weights_in_the_folder_are_not_read_and_named(folder: Path, name: str) -> None:
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / name)
    assert _same_as_transformers(folder)
    (note,) = Checkpoint.open(str(folder)).notes
    assert name in note and f"{SINGLE_FILE} is read" in note


def _rename(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / SINGLE_FILE).rename(folder / name)


def _link(folder: Path) -> None:
    (folder / SINGLE_FILE).unlink()
    (folder / SINGLE_FILE).symlink_to("../blobs/nothing")


def _pointer(folder: Path) -> None:
    (folder / SINGLE_FILE).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9\n")


def _artifact(folder: Path) -> None:
    _rename("delta-00001-of-00001.safetensors")(folder)
    (folder / "meswitch.json").write_text("{}")


def _distributed(folder: Path) -> None:
    shutil.copy(folder / SINGLE_FILE, folder / "shard-00001-model-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_rename("model.fp16.safetensors"), r"only as a variant \(model\.fp16\.safetensors\)"),
        (_rename("consolidated.safetensors"), "consolidated.safetensors has another name"),
        (_rename("model.gguf"), "only as GGUF"),
        (_rename("pytorch_model.bin"), "only as pickle"),
        (_rename("model.txt"), f"no {SINGLE_FILE} and no {INDEX_FILE}"),
        (_link, "a link to a file that is not there"),
        (_pointer, "a Git LFS pointer, not the weights"),
        (_distributed, "part of a distributed checkpoint"),
        (_artifact, "an artifact, where a whole model is asked for; make one of it: meswitch restore"),
    ],
    ids=["variant", "consolidated", "gguf", "pickle", "nothing", "link", "pointer", "distributed", "artifact"],
)
def test_weights_that_are_not_there_are_refused_by_what_is(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_a_pointer_in_place_of_a_json_file_is_named(sharded: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    _pointer(folder)
    (folder / SINGLE_FILE).rename(folder / file)
    with pytest.raises(CheckpointError, match=f"{file}: a Git LFS pointer"):
        Checkpoint.open(str(folder))


@pytest.mark.parametrize("beside", ["nothing", "config", "weights"])
def test_an_adapter_is_called_one(folder: Path, beside: str) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    if beside != "weights":
        (folder / SINGLE_FILE).unlink()
    if beside == "nothing":
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter \(LORA.*merge"):
        Checkpoint.open(str(folder))


def test_an_adapter_without_its_config_is_called_one(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="an adapter"):
        Checkpoint.open(str(folder))


def test_no_quantization_is_no_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert _same_as_transformers(folder)
    assert "quantization_config" not in Checkpoint.open(str(folder)).config
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(CheckpointError, match="empty quantization_config, with which transformers does not load"):
        Checkpoint.open(str(folder))
