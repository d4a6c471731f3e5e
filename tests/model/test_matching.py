import json
import shutil
from pathlib import Path

import pytest

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import fingerprint, tensor_digest
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.architecture import architecture
from meswitch_cli.model.matching import Plan, make_plan
from zoo.tiny import DENSE_FAMILIES, make_pair


def _plan(base: Path, expert: Path) -> Plan:
    return make_plan(Checkpoint.open(str(base)), Checkpoint.open(str(expert)))


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_every_tensor_of_every_family_is_planned_once(tmp_path: Path, family: str) -> None:
    base, expert = make_pair(tmp_path, family)
    plan = _plan(base, expert)
    names = [item.expert.name for item in plan.tensors]
    assert sorted(names) == sorted(Checkpoint.open(str(expert)).tensors)
    assert len(plan.units) == plan.architecture.num_layers + 1
    for index, unit in enumerate(plan.units[:-1]):
        assert unit and all(item.layer == index for item in unit)
        assert all(item.kind in ("linear", "dense") for item in unit)
        assert sum(item.kind == "linear" for item in unit) >= 4
    kinds = [item.kind for item in plan.units[-1]]
    assert kinds.count("embedding") == 1
    config = json.loads((expert / "config.json").read_text())
    assert kinds.count("head") == (0 if config.get("tie_word_embeddings", False) else 1)


@pytest.mark.parametrize(
    ("family", "matrices", "first", "shape"),
    [
        ("mixtral", 12, "model.layers.0.block_sparse_moe.experts.0.w1.weight", (72, 96)),
        ("gpt_oss", 8, "model.layers.0.mlp.experts.gate_up_proj.0", (144, 96)),
    ],
)
def test_experts_of_a_mixture_are_planned_each_by_itself(
    tmp_path: Path, family: str, matrices: int, first: str, shape: tuple[int, ...]
) -> None:
    plan = _plan(*make_pair(tmp_path, family))
    for unit in plan.units[:-1]:
        assert sum(item.stacked for item in unit) == matrices
        assert all(item.kind == "linear" for item in unit if item.stacked)
        (router,) = (item for item in unit if item.name.endswith(("mlp.gate.weight", "mlp.router.weight")))
        assert router.kind == "dense"
    found = {item.name: item for item in plan.tensors}[first]
    assert found.shape == shape and found.layer == 0


def test_other_architecture(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base, _ = make_pair(tmp_path / "a", "llama")
    _, expert = make_pair(tmp_path / "b", "qwen2")
    with pytest.raises(CheckpointError, match=r"base is 'llama'.*expert is 'qwen2'"):
        _plan(base, expert)


def test_other_width(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base, _ = make_pair(tmp_path / "a", intermediate_size=96)
    _, expert = make_pair(tmp_path / "b", intermediate_size=128)
    with pytest.raises(CheckpointError, match="differ in width"):
        _plan(base, expert)


def test_other_depth(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base, _ = make_pair(tmp_path / "a", num_hidden_layers=2)
    _, expert = make_pair(tmp_path / "b", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="only the expert has"):
        _plan(base, expert)


def test_added_vocabulary_rows_are_seen(tmp_path: Path) -> None:
    plan = _plan(*make_pair(tmp_path, added_rows=3, tie_word_embeddings=False))
    assert plan.added_rows == 3
    assert {item.name for item in plan.tensors if item.shape[0] - item.shared_rows == 3 and item.kind != "dense"} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_missing_and_foreign_tensors(tmp_path: Path) -> None:
    import safetensors.torch

    base, expert = make_pair(tmp_path)
    file = expert / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    removed = tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 tensors of llama are missing, the first is 'model\.norm\.weight'"):
        _plan(base, expert)
    safetensors.torch.save_file(tensors | {"model.norm.weight": removed, "adapter.weight": removed.clone()}, file)
    with pytest.raises(CheckpointError, match=r"not part of llama, the first is 'adapter\.weight'"):
        _plan(base, expert)


def test_names_without_the_prefix_are_understood(tmp_path: Path) -> None:
    import safetensors.torch

    base, expert = make_pair(tmp_path)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    renamed = {name.removeprefix("model."): value for name, value in tensors.items()}
    safetensors.torch.save_file(renamed, base / "model.safetensors")
    plan = _plan(base, expert)
    assert all(f"model.{item.base.name}" == item.base.parameter.name or item.kind == "head" for item in plan.tensors)


def test_unknown_model_type(tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path)
    config = json.loads((base / "config.json").read_text())
    for folder in (base, expert):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(CheckpointError, match="nonesuch"):
        _plan(base, expert)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "evil.py").write_text("raise SystemExit('ran')")
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    assert architecture(config, str(base)).model_type == "llama"


def test_fingerprint_is_of_tensors_not_of_files(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()

    def of(folder: Path) -> str:
        checkpoint = Checkpoint.open(str(folder))
        return fingerprint({name: tensor_digest(name, checkpoint.read(name)) for name in checkpoint.tensors})

    base, expert = make_pair(tmp_path / "one")
    sharded, _ = make_pair(tmp_path / "many", max_shard_size="20KB")
    assert of(base) == of(sharded)
    assert of(base) != of(expert)
    shutil.rmtree(sharded)
