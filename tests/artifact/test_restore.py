import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import ArtifactError
from zoo.tiny import DENSE_FAMILIES, Pair, make_pair

Make = Callable[..., Artifact]
IDS = torch.arange(4, 36).view(2, 16)


def _logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def _restore(artifact: Artifact, base: Path, out: Path, **options: object) -> Path:
    return restore(artifact, Checkpoint.open(str(base)), out, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_restored_expert_loads_and_is_near_the_expert(tmp_path: Path, make_artifact: Make, family: str) -> None:
    pair = make_pair(tmp_path, family, dtype=torch.float32, heavy_columns=0)
    artifact = make_artifact(pair, bits=4, embedding_bits=4, salient=8)
    out = _restore(artifact, pair[0], tmp_path / "restored")
    expert = _logits(pair[1])
    distance = (_logits(out) - expert).square().mean() / (_logits(pair[0]) - expert).square().mean()
    assert distance < 0.02  # 4-bit codes leave 1.2 % of a Gaussian delta's energy


@pytest.mark.parametrize("settings", [{}, {"bits": 0.25, "rank": 3}, {"bits": 1, "code": "trellis"}], ids=str)
def test_restored_weights_are_base_plus_dequantised_delta(
    pair: Pair, tmp_path: Path, make_artifact: Make, settings: dict[str, Any]
) -> None:
    artifact = make_artifact(pair, **settings)
    out = _restore(artifact, pair[0], tmp_path / "restored", dtype=torch.float32)
    base, restored = Checkpoint.open(str(pair[0])), Checkpoint.open(str(out))
    for entry in artifact.manifest.tensors:
        assert torch.equal(restored.read(entry.name), artifact.expert_tensor(entry, base.read(entry.base)))
    for name in artifact.manifest.unchanged:
        assert torch.equal(restored.read(name), base.read(name).float())


@pytest.mark.parametrize("tied", [True, False])
def test_added_vocabulary_rows_and_tying(tmp_path: Path, make_artifact: Make, tied: bool) -> None:
    pair = make_pair(tmp_path, added_rows=3, tie_word_embeddings=tied)
    out = _restore(make_artifact(pair), pair[0], tmp_path / "restored")
    expert, restored = Checkpoint.open(str(pair[1])), Checkpoint.open(str(out))
    assert set(restored.tensors) == {name for name in expert.tensors if not (tied and name == "lm_head.weight")}
    for name in ("model.embed_tokens.weight", "lm_head.weight")[: 1 if tied else 2]:
        assert torch.equal(restored.read(name)[-3:], expert.read(name)[-3:])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(pair[1]))


def test_head_tied_in_one_model_only(tmp_path: Path, make_artifact: Make) -> None:
    (tmp_path / "tied").mkdir()
    (tmp_path / "untied").mkdir()
    tied = make_pair(tmp_path / "tied", tie_word_embeddings=True, dtype=torch.float32)
    untied = make_pair(tmp_path / "untied", tie_word_embeddings=False, dtype=torch.float32)
    for index, pair in enumerate([(tied[0], untied[1]), (untied[0], tied[1])]):
        artifact = make_artifact(pair, out=f"artifact{index}", bits=4, embedding_bits=4)
        out = _restore(artifact, pair[0], tmp_path / f"restored{index}")
        expert = _logits(pair[1])
        assert (_logits(out) - expert).square().mean() < 0.02 * (_logits(pair[0]) - expert).square().mean()


def test_unchanged_norms_and_tensors_take_no_room(tmp_path: Path, make_artifact: Make) -> None:
    equal = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    pair = make_pair(tmp_path, equal=equal, change_norms=False)
    manifest = make_artifact(pair).manifest
    assert set(equal) <= set(manifest.unchanged)
    assert any("norm" in name for name in manifest.unchanged)
    assert not any("norm" in entry.name for entry in manifest.tensors)


def test_changed_norms_and_biases_are_exact(tmp_path: Path, make_artifact: Make) -> None:
    pair = make_pair(tmp_path, "qwen2")
    artifact = make_artifact(pair)
    expert, restored = Checkpoint.open(str(pair[1])), Checkpoint.open(str(_restore(artifact, pair[0], tmp_path / "r")))
    dense = [entry.name for entry in artifact.manifest.tensors if entry.kind == "dense"]
    assert any("norm" in name for name in dense) and any("bias" in name for name in dense)
    for name in dense:
        assert torch.equal(restored.read(name), expert.read(name))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_sharding_and_dtype(pair: Pair, tmp_path: Path, make_artifact: Make, dtype: torch.dtype | None) -> None:
    out = _restore(make_artifact(pair), pair[0], tmp_path / "restored", dtype=dtype, max_shard_bytes=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    stored = {info.dtype for info in Checkpoint.open(str(out)).tensors.values()}
    assert stored == {dtype or torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype or torch.bfloat16).removeprefix("torch.")
    assert torch.isfinite(_logits(out)).all()


def test_wrong_base_leaves_nothing_behind(pair: Pair, tmp_path: Path, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    (tmp_path / "other").mkdir()
    other, _ = make_pair(tmp_path / "other", seed=9)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError, match="wrong base"):
        _restore(artifact, other, tmp_path / "restored")
    assert sorted(tmp_path.iterdir()) == before


def test_a_swapped_shard_and_a_missing_file_are_refused(pair: Pair, tmp_path: Path, make_artifact: Make) -> None:
    """Of the same names, shapes and types: only the hash tells it from the artifact's own."""
    artifact, other = make_artifact(pair), make_artifact(pair, out="other", steps="least-squares")
    name = artifact.manifest.shards[0].name
    own = (artifact.path / name).read_bytes()
    (artifact.path / name).write_bytes((other.path / name).read_bytes())
    with pytest.raises(ArtifactError, match=f"{name}: its SHA-256 is not the manifest's"):
        _restore(artifact, pair[0], tmp_path / "restored")
    (artifact.path / name).write_bytes(own)
    (artifact.path / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: missing"):
        _restore(artifact, pair[0], tmp_path / "restored")
    assert not (tmp_path / "restored").exists() and not list(tmp_path.glob(".*"))


def test_unfinished_compression_of_the_same_name_is_left_alone(pair: Pair, tmp_path: Path, make_artifact: Make) -> None:
    (tmp_path / ".restored.partial").mkdir()
    (tmp_path / ".restored.partial" / "identity.json").write_text("{}")
    _restore(make_artifact(pair), pair[0], tmp_path / "restored")
    assert (tmp_path / ".restored.partial" / "identity.json").exists()


def test_a_full_disk_is_an_error_that_leaves_nothing(pair: Pair, tmp_path: Path, make_artifact: Make) -> None:
    """A limit on the size of files stands for the full disk: the same write is refused."""
    artifact = make_artifact(pair)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(ArtifactError, match=r"part-00000\.safetensors: File too large"):
            _restore(artifact, pair[0], tmp_path / "restored")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "restored").exists() and not list(tmp_path.glob(".*"))


def test_occupied_output_is_left_alone(pair: Pair, tmp_path: Path, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ArtifactError, match="in use"):
            _restore(artifact, pair[0], out, force=force)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_force_replaces_a_checkpoint(pair: Pair, tmp_path: Path, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    out = _restore(artifact, pair[0], tmp_path / "restored")
    with pytest.raises(ArtifactError, match="in use"):
        _restore(artifact, pair[0], out)
    _restore(artifact, pair[0], out, force=True, dtype=torch.float32)
    assert {info.dtype for info in Checkpoint.open(str(out)).tensors.values()} == {torch.float32}
