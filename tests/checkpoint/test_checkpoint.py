import json
import shutil
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError

from meswitch_cli.checkpoint.checkpoint import INDEX_FILE, Checkpoint
from meswitch_cli.checkpoint.source import resolve
from meswitch_cli.errors import CheckpointError
from zoo.tiny import Pair, make_pair


@pytest.fixture
def copy(pair: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "copy"))


def test_single_file_and_sharded_hold_the_same_tensors(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    whole = Checkpoint.open(str(make_pair(tmp_path / "one")[0]))
    sharded = Checkpoint.open(str(make_pair(tmp_path / "many", max_shard_size="20KB")[0]))
    assert len({info.path for info in sharded.tensors.values()}) > 1
    assert set(whole.tensors) == set(sharded.tensors)
    for name in whole.tensors:
        assert torch.equal(whole.read(name), sharded.read(name))


def test_reading_headers_reads_no_weights(copy: Path) -> None:
    checkpoint = Checkpoint.open(str(copy))
    shutil.rmtree(copy)  # nothing is held open, nothing was kept
    assert checkpoint.nbytes > 0
    with pytest.raises(Exception, match="No such file"):
        checkpoint.read(next(iter(checkpoint.tensors)))


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(str(tmp_path))


def test_no_such_folder_and_no_hub_id() -> None:
    for name in ("./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve(name)


def test_a_file_is_not_a_folder(copy: Path) -> None:
    with pytest.raises(CheckpointError, match="a file, not a checkpoint folder"):
        resolve(str(copy / "config.json"))


def test_hub_cache_folder_keeps_its_name_and_revision(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    source = resolve(str(snapshot))
    assert (source.id, source.revision) == ("owner/name", "abc123")


def test_missing_shard(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, max_shard_size="20KB")
    shards = sorted(base.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"1 of {len(shards)} shards missing: {shards[1].name}"):
        Checkpoint.open(str(base))


def test_index_may_not_leave_the_folder(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    (copy / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        Checkpoint.open(str(copy))


def test_truncated_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*cut short"):
        Checkpoint.open(str(copy))


def test_pickled_weights_are_not_opened(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        Checkpoint.open(str(copy))


def test_quantized_checkpoint_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="already quantized \\(gptq\\)"):
        Checkpoint.open(str(copy))
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": ["int8"]}))
    with pytest.raises(CheckpointError, match="already quantized \\(\\['int8'\\]\\)"):
        Checkpoint.open(str(copy))


def test_hub_is_asked_for_safetensors_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = resolve("owner/name@v1")
    assert asked["repository"] == "owner/name" and asked["revision"] == "v1"
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["patterns"])
    assert source.id == "owner/name"


def test_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_args: object, **_kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(
        CheckpointError, match="owner/name: no such folder here, and the Hub does not give it: no route"
    ):
        resolve("owner/name")


@pytest.mark.parametrize(
    ("offline", "cause", "told"),
    [
        (True, OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set, and the Hub's cache does not hold it"),
        (False, OSError("no route to host"), r"the Hub cannot be reached \(no route to host\); go online"),
        (
            False,
            RevisionNotFoundError(
                "404 Client Error.\n\nno such revision",
                response=httpx2.Response(404, request=httpx2.Request("GET", "https://huggingface.co")),
            ),
            "An error happened.*; 404 Client Error. no such revision. Check the name",
        ),
    ],
    ids=["offline", "no net", "no such revision"],
)
def test_what_the_client_calls_a_cache_miss_is_told_by_its_cause(
    monkeypatch: pytest.MonkeyPatch, offline: bool, cause: Exception, told: str
) -> None:
    def download(*_args: object, **_kwargs: object) -> str:
        raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub") from cause

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    unreadable = "owner/name@v1: no such folder here, and the Hub does not give it"
    with pytest.raises(CheckpointError, match=f"{unreadable}: {told}"):
        resolve("owner/name@v1")
