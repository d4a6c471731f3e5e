"""An artifact to the Hub and back, against a stand-in of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx2
import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from command_line import fails, meswitch
from hub.standin import StandIn
from huggingface_hub.errors import OfflineModeIsEnabled

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.card import Card
from meswitch_cli.errors import ArtifactError
from meswitch_cli.hub import find_artifact, open_artifact, pull, push
from meswitch_cli.hub.names import HubName
from meswitch_cli.server.experts import named_experts
from zoo.tiny import Pair

Make = Callable[..., Artifact]
REPO = "ann/maths-1bit"


@pytest.fixture
def artifact(pair: Pair, make_artifact: Make) -> Artifact:
    """Of three shards, so that one can be missing."""
    return make_artifact(pair, max_shard_bytes=1)


def _names(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def test_what_was_pushed_is_what_is_pulled(hub: StandIn, artifact: Artifact, tmp_path: Path) -> None:
    done = push(artifact, REPO, base_model="ann/llama-maths", licence="apache-2.0")
    assert (done.repo, done.notes) == (REPO, ())
    assert hub.repositories[REPO].private
    assert len(hub.uploaded) == len(artifact.manifest.shards) == 3
    pulled = pull(REPO, tmp_path / "pulled")
    assert pulled.digest == artifact.digest
    assert _names(pulled.path) == _names(artifact.path)
    card = Card.read(pulled.path)
    assert card.front["base_model"] == "ann/llama-maths" and card.front["license"] == "apache-2.0"
    assert f'"{REPO}")' in card.body
    assert Card.read(artifact.path).front["license"] == "unknown"  # what lies here is left as it is
    assert open_artifact(done.name).digest == artifact.digest
    tensors = safetensors.torch.load_file(pulled.path / pulled.manifest.shards[0].name)  # readable by anyone
    assert any(name.endswith(".codes") and tensor.dtype == torch.int32 for name, tensor in tensors.items())


def test_a_card_says_what_it_does_not_know(hub: StandIn, artifact: Artifact) -> None:
    notes = push(artifact.path, REPO, public=True).notes
    assert [note.partition(",")[0] for note in notes] == [
        "the card says that the licence is unknown",
        "the card names no fine-tune",
    ]
    assert not hub.repositories[REPO].private


def test_a_push_that_broke_off_sends_the_rest_alone(hub: StandIn, artifact: Artifact) -> None:
    missing = artifact.manifest.shards[1].sha256
    hub.refuse_upload.add(missing)
    with pytest.raises(ArtifactError, match=r"ann/maths-1bit: cannot be pushed to.*403.*the same command goes on"):
        push(artifact, REPO)
    assert "meswitch.json" not in hub.repositories[REPO].files("main")[1]  # a commit is whole or is not
    sent = set(hub.uploaded)
    hub.refuse_upload.clear()
    hub.uploaded.clear()
    push(artifact, REPO)
    assert set(hub.uploaded) == {shard.sha256 for shard in artifact.manifest.shards} - sent
    assert missing in hub.uploaded
    before, commits = hub.repositories[REPO].branches["main"], hub.counted(r"^POST .*/commit/")
    assert push(artifact, REPO).commit == before  # nothing new: no commit
    assert hub.counted(r"^POST .*/commit/") == commits


def test_large_files_go_in_parts(hub: StandIn, artifact: Artifact) -> None:
    hub.part_bytes = 5000
    push(artifact, REPO)
    assert hub.counted(r"^PUT /lfs/[0-9a-f]+/2$") == 3
    assert pull(REPO).digest == artifact.digest


def test_a_pull_that_broke_off_goes_on(hub: StandIn, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    push(artifact, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.break_after = 3000
    assert pull(REPO).digest == artifact.digest
    assert hub.ranges == ["bytes=3000-"]
    fetched = hub.counted("^GET /cdn/")
    assert pull(REPO).digest == artifact.digest
    assert hub.counted("^GET /cdn/") == fetched == len(artifact.manifest.shards) + 1


def test_another_artifact_replaces_the_shards(
    hub: StandIn, pair: Pair, artifact: Artifact, make_artifact: Make
) -> None:
    first = push(artifact, REPO)
    hub.repositories[REPO].files("main")[1]["notes.txt"] = (b"mine", None)
    second = make_artifact(pair, out="second", bits=4)
    push(second, REPO)
    files = hub.repositories[REPO].files("main")[1]
    assert sorted(name for name in files if name.startswith("delta-")) == ["delta-00001-of-00001.safetensors"]
    assert "notes.txt" in files
    assert pull(REPO).digest == second.digest
    assert not (pull(REPO).path / "notes.txt").exists()  # the manifest does not list it
    assert pull(first.name).digest == pull(f"{REPO}@{first.commit}").digest == artifact.digest


def test_a_branch_is_a_revision(hub: StandIn, pair: Pair, artifact: Artifact, make_artifact: Make) -> None:
    push(artifact, REPO)
    other = make_artifact(pair, out="other", bits=1)
    push(other, REPO, revision="bits-1")
    assert open_artifact(f"{REPO}@bits-1").digest == other.digest
    assert open_artifact(REPO).digest == artifact.digest
    with pytest.raises(ArtifactError, match="ann/maths-1bit@bits-3: no such folder here, and the Hub does not give it"):
        open_artifact(f"{REPO}@bits-3")


def test_without_a_net_the_cache_answers(hub: StandIn, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    push(artifact, REPO)
    pull(REPO)
    seen = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert open_artifact(REPO).digest == artifact.digest
    assert len(list(open_artifact(REPO).verify())) == len(artifact.manifest.shards) + len(artifact.manifest.files)
    with pytest.raises(ArtifactError, match="ann/other: no such folder here"):
        open_artifact("ann/other")
    assert len(hub.requests) == seen


def test_a_private_repository_needs_the_token(
    hub: StandIn, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(artifact, REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ArtifactError, match="hf auth login"):
        pull(REPO)
    with pytest.raises(ArtifactError, match=r"bob/x: cannot be pushed to.*401"):
        push(artifact, "bob/x")


@pytest.mark.parametrize(
    ("offline", "error", "told"),
    [
        (
            False,
            httpx2.ConnectError("no route"),
            r"the Hub cannot be reached \(no route\); go online, and give the same",
        ),
        (True, OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset the variable, and give the same command"),
    ],
    ids=["no net", "offline"],
)
def test_a_hub_out_of_reach_is_no_question_of_rights(
    hub: StandIn, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, offline: bool, error: Exception, told: str
) -> None:
    def unreached(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(ArtifactError, match=rf"^{REPO}: cannot be pushed to: {told}") as caught:
        push(artifact, REPO)
    assert "rights" not in str(caught.value)


def test_damage_is_found_before_a_push_and_after_a_pull(hub: StandIn, artifact: Artifact, tmp_path: Path) -> None:
    push(artifact, REPO)
    broken = Path(shutil.copytree(artifact.path, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: 2 bytes"):
        push(broken, "ann/broken")
    assert "ann/broken" not in hub.repositories
    files = hub.repositories[REPO].files("main")[1]
    files["tokenizer.json"] = (b"{}", None)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: 2 bytes.*pull again"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_repository_of_something_else_is_told_from_a_missing_one(hub: StandIn, artifact: Artifact) -> None:
    push(artifact, REPO)
    del hub.repositories[REPO].files("main")[1]["meswitch.json"]
    with pytest.raises(ArtifactError, match=r"a repository without meswitch\.json"):
        pull(REPO)
    with pytest.raises(ArtifactError, match="Check the name"):
        pull("ann/none")


def test_a_card_that_the_hub_refuses_is_an_error_before_the_upload(hub: StandIn, artifact: Artifact) -> None:
    card = artifact.path / "README.md"
    card.write_text(card.read_text().replace("library_name:", "base_model: maths\nlibrary_name:"))
    with pytest.raises(ArtifactError, match=r"base_model.*is not valid"):
        push(artifact, REPO)
    assert hub.uploaded == []


def test_a_folder_comes_before_a_repository(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann" / "maths-1bit").mkdir(parents=True)
    assert find_artifact(REPO) == Path(REPO)
    for name in ("maths", "./ann/other", "/ann/other", "a/b/c", "~/x"):
        assert find_artifact(name) == Path(name).expanduser()
    assert hub.requests == []


def test_out_that_is_taken_is_left_alone(hub: StandIn, artifact: Artifact, tmp_path: Path) -> None:
    push(artifact, REPO)
    pulled = pull(REPO, tmp_path / "out")
    with pytest.raises(ArtifactError, match="in use"):
        pull(REPO, pulled.path)
    (pulled.path / "README.md").unlink()
    assert pull(REPO, pulled.path, force=True).path == pulled.path
    assert (pulled.path / "README.md").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(ArtifactError, match="in use"):
        pull(REPO, tmp_path / "mine", force=True)


@pytest.mark.parametrize("text", ["x", "a/b/c", "./a/b", "a/b@", "-a/b", "a/b@-x", "a/b@@c", "a//b", "a /b"])
def test_what_is_no_name_on_the_hub(text: str) -> None:
    assert HubName.parse(text) is None
    with pytest.raises(ArtifactError, match="not a Hub id"):
        pull(text)


@pytest.mark.parametrize("text", ["a/b", "a/b@main", "a-1/b.c_d@refs/pr/1"])
def test_what_is_a_name_on_the_hub(text: str) -> None:
    assert str(HubName.parse(text)) == text


def test_the_commands_take_ids(hub: StandIn, pair: Pair, artifact: Artifact, tmp_path: Path) -> None:
    """In processes of their own, with what the environment says."""

    def run(*arguments: object) -> str:
        result = meswitch(*arguments, online=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    pushed = json.loads(run("push", artifact.path, "--repo", REPO, "--licence", "mit", "--json"))
    assert pushed["name"] == f"{REPO}@{hub.repositories[REPO].branches['main']}"
    assert json.loads(run("inspect", REPO, "--json"))["bytes"] == artifact.manifest.nbytes
    assert "is its base" in run("verify", pushed["name"], "--base", pair[0])
    out = run("pull", REPO, "--out", tmp_path / "pulled").strip()
    assert Artifact.open(out).digest == artifact.digest
    run("restore", REPO, "--base", pair[0], "--out", tmp_path / "restored")
    assert (tmp_path / "restored" / "model.safetensors").is_file()
    named, _ = named_experts([f"maths={REPO}"])
    assert Artifact.open(named["maths"]).digest == artifact.digest
    fails(meswitch("inspect", "ann/none", online=True), 1, "ann/none: no such folder here", "hf auth login")
