"""Merged LoRAs: recognised at their rank, stored as their products alone, and nothing else taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_line import fails, in_process
from compression.test_exact import sparse_pair, tensors_of

import meswitch_cli as meswitch
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.form import FormSizes, choose_form, form_sizes, in_smallest_form
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.product import product_rank
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import CheckpointError, UsageError
from meswitch_cli.model.adapted import open_expert
from meswitch_cli.model.matching import make_plan
from zoo.merged import merge_lora
from zoo.tiny import make_pair

SHAPE = {"hidden_size": 128, "intermediate_size": 192}


def rank_of(base: Path, expert: Path) -> int | None:
    opened = Checkpoint.open(str(base))
    tuned = open_expert(str(expert), opened)
    return product_rank(opened, tuned, make_plan(opened, tuned))


def chosen(base: Path, expert: Path, out: Path) -> Artifact:
    """What is stored where nothing is said."""
    return meswitch.compress(base, expert, out, keep_weak=True)


def base_of(folder: Path, **options: Any) -> Path:
    return make_pair(folder, **(SHAPE | options))[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("base"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def merged(base: Path) -> Path:
    return merge_lora(base, base.parent / "merged")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float32], ids=str)
def test_a_merged_lora_is_its_products(of_base: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_of(tmp_path, dtype=of_base)
    expert = merge_lora(base, tmp_path / "merged", dtype=dtype)
    artifact = chosen(base, expert, tmp_path / "artifact")
    linears = [entry for entry in artifact.manifest.tensors if entry.kind == "linear"]
    assert len(linears) == 14 and {(entry.bits, entry.rank, entry.factor_bits) for entry in linears} == {(0, 4, 8)}
    restore(artifact, Checkpoint.open(str(base)), tmp_path / "restored")
    found, wanted, own = (tensors_of(folder) for folder in (tmp_path / "restored", expert, base))
    for entry in linears:
        delta = wanted[entry.name].double() - own[entry.name].double()
        missed = (found[entry.name].double() - wanted[entry.name].double()).square().sum() / delta.square().sum()
        assert missed < 2e-3
        assert entry.weight_error is not None and entry.weight_error < 2e-3


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss", "gemma3"])
def test_of_every_layout(family: str, tmp_path: Path) -> None:
    """Weights that are kept the other way round, experts of mixtures apart and in one tensor."""
    base = make_pair(tmp_path, family)[0]
    expert = merge_lora(base, tmp_path / "merged")
    assert rank_of(base, expert) == 4
    artifact = chosen(base, expert, tmp_path / "artifact")
    linears = [entry for entry in artifact.manifest.tensors if entry.kind == "linear"]
    assert linears and {(entry.bits, entry.rank) for entry in linears} == {(0, 4)}
    verified = in_process("verify", tmp_path / "artifact", "--base", base)
    assert verified.returncode == 0, verified.stderr


def test_of_some_projections_only(base: Path, tmp_path: Path) -> None:
    expert = merge_lora(base, tmp_path / "merged", rank=8, targets=("q_proj", "v_proj"))
    artifact = chosen(base, expert, tmp_path / "artifact")
    assert {entry.projection for entry in artifact.manifest.tensors} == {"q_proj", "v_proj"}
    assert {(entry.bits, entry.rank) for entry in artifact.manifest.tensors} == {(0, 8)}
    looked = in_process("inspect", "--base", base, "--expert", expert, "--json")
    assert json.loads(looked.stdout)["kind"] == "lora"


def test_what_is_no_lora(base: Path, merged: Path, tmp_path: Path) -> None:
    """A full fine-tune, a sparse update, the base itself, most of a full update's energy in few directions, a LoRA
    under a full update of one layer in the middle, which no sample sees."""
    full = make_pair(tmp_path / "full", **SHAPE)
    assert rank_of(*full) is None
    sparse = sparse_pair(tmp_path / "sparse", share=0.05, **SHAPE)
    assert rank_of(*sparse) is None and chosen(*sparse, tmp_path / "exact").manifest.exact
    assert rank_of(base, base) is None
    mostly = merge_lora(base, tmp_path / "mostly", rank=16, relative=0.02, rest=0.11)
    assert rank_of(base, mostly) is None
    deep = base_of(tmp_path / "deep", num_hidden_layers=6)
    expert = merge_lora(deep, tmp_path / "deep-merged")
    assert rank_of(deep, expert) == 4
    tensors = tensors_of(expert)
    name = "model.layers.1.mlp.up_proj.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    tensors[name] = (tensors[name].float() + 0.01 * noise * tensors[name].float().std()).to(tensors[name].dtype)
    safetensors.torch.save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    assert rank_of(deep, expert) is None
    assert chosen(deep, expert, tmp_path / "coded").manifest.settings["bits"] == 1


def test_a_tensor_of_a_higher_rank(tmp_path: Path) -> None:
    """In the middle, unseen by the sample: the rank is the one that explains it too."""
    base = base_of(tmp_path, num_hidden_layers=6)
    lower = merge_lora(base, tmp_path / "lower")
    higher = tensors_of(merge_lora(base, tmp_path / "higher", rank=8))
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file(
        tensors_of(lower) | {name: higher[name]}, lower / "model.safetensors", metadata={"format": "pt"}
    )
    assert rank_of(base, lower) == 8


def test_the_smaller_form_is_taken(tmp_path: Path) -> None:
    """Products of a rank whose factors are larger than the code are not."""
    base = base_of(tmp_path, num_key_value_heads=4)
    expert = merge_lora(base, tmp_path / "merged", rank=32)
    job = prepare(str(base), str(expert), tmp_path / "out", CompressionSettings.with_defaults(), None)
    found, sizes = in_smallest_form(job)
    assert sizes is not None and sizes.rank == 32 and sizes.product is not None and sizes.product > sizes.code
    assert sizes.best == "code" and found.settings == job.settings


@pytest.mark.parametrize(
    ("exact", "code", "product", "best"),
    [
        (300, 100, 104, "product"),
        (300, 100, 106, "code"),
        (300, 100, None, "code"),
        (100, 100, 90, "product"),
        (100, 102, 104, "exact"),
        (0, 0, None, "code"),
    ],
)
def test_products_may_take_a_twentieth_more_than_the_code(
    exact: int, code: int, product: int | None, best: str
) -> None:
    """They are nearer; nothing is nearer than bit for bit."""
    assert FormSizes(exact, code, product, 64 if product else None).best == best


def test_sizes_are_those_of_artifacts(base: Path, merged: Path, tmp_path: Path) -> None:
    job = prepare(str(base), str(merged), tmp_path / "out", CompressionSettings.with_defaults(), None)
    sizes = form_sizes(job.base, job.expert, job.plan, job.settings, 4)
    artifact = chosen(base, merged, tmp_path / "artifact")
    assert sizes is not None and sizes.product == sum(entry.nbytes for entry in artifact.manifest.tensors)
    assert sizes.product < min(sizes.code, sizes.exact)


def test_what_is_said(base: Path, merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    run = in_process("compress", "--base", base, "--expert", merged, "--out", out)
    said = next(line for line in run.stderr.splitlines() if "--bits 1" in line)
    assert "a merged LoRA of rank 4" in said and "bit for bit" in said
    assert "rank 4 if changed" in run.stderr and "rounding" in run.stdout
    figures = json.loads(
        in_process("compress", "--base", base, "--expert", merged, "--out", out, "--force", "--json").stdout
    )
    assert figures["settings"]["bits"] == 0 and figures["settings"]["rank"] == 4
    expected = figures["expected_bytes"]
    assert expected["product"] < min(expected["code"], expected["exact"]) and expected["rank"] == 4
    looked = json.loads(in_process("inspect", "--base", base, "--expert", merged, "--json").stdout)
    assert looked["sizes"] == expected and looked["rank"] == 4 and looked["kind"] == "lora"
    shown = in_process("inspect", "--base", base, "--expert", merged).stdout
    assert "products of rank 4 alone by itself" in shown
    assert "of rank 4" in (out / "README.md").read_text()
    assert "rank 4" in in_process("inspect", out).stdout


@pytest.mark.parametrize("options", [("--bits", 1), ("--rank", 8), ("--embedding-bits", 2), ("--exact",)], ids=str)
def test_an_option_of_another_form_keeps_it(
    options: tuple[object, ...], base: Path, merged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact"
    run = in_process("compress", "--base", base, "--expert", merged, "--out", out, "--keep-weak", *options)
    assert run.returncode == 0, run.stderr
    assert all(entry.bits or entry.exact for entry in Artifact.open(out).manifest.tensors)


def test_a_changed_head_and_embedding_are_coded_beside_products(tmp_path: Path) -> None:
    base = base_of(tmp_path, vocab_size=300)
    expert = merge_lora(base, tmp_path / "merged")
    tensors = tensors_of(expert)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
        tensors[name] = (tensors[name].float() * (1 + 0.05 * noise)).to(tensors[name].dtype)
    safetensors.torch.save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    artifact = chosen(base, expert, tmp_path / "artifact")
    found = {entry.kind: entry for entry in artifact.manifest.tensors}
    assert (found["linear"].bits, found["linear"].rank) == (0, 4)
    assert (found["head"].bits, found["head"].salient, found["embedding"].bits) == (1, 8, 1)
    assert found["head"].rank and found["embedding"].rank
    assert found["head"].output_error is not None and found["dense"].nbytes
    assert artifact.manifest.settings["calibration"] == "random"


def test_without_a_head_of_its_own_nothing_is_calibrated(base: Path, merged: Path, tmp_path: Path) -> None:
    assert chosen(base, merged, tmp_path / "artifact").manifest.settings["calibration"] is None


def test_rounding_alone_is_no_lora_that_changes_anything(tmp_path: Path) -> None:
    """A LoRA of some projections over an fp32 base, saved in bf16: the others differ from the base by rounding."""
    base = base_of(tmp_path, dtype=torch.float32)
    expert = merge_lora(base, tmp_path / "merged", targets=("q_proj",), dtype=torch.bfloat16)
    assert rank_of(base, expert) == 4
    artifact = meswitch.compress(base, expert, tmp_path / "artifact", bits=0, rank=4)
    restore(artifact, Checkpoint.open(str(base)), tmp_path / "restored")
    found, wanted = tensors_of(tmp_path / "restored"), tensors_of(expert)
    same = [torch.equal(found[name], wanted[name]) for name in wanted if "_proj" in name and "q_proj" not in name]
    assert len(same) == 12 and all(same)
    assert {entry.projection for entry in artifact.manifest.tensors} == {"q_proj"}
    rounded = merge_lora(base, tmp_path / "rounded", targets=("none",), dtype=torch.bfloat16)
    assert rank_of(base, rounded) is None


def test_an_interrupted_run_ends_with_the_same_bytes(base: Path, merged: Path, tmp_path: Path) -> None:
    def job(out: Path) -> Any:
        opened = prepare(str(base), str(merged), out, CompressionSettings.with_defaults(), None)
        return choose_form(opened, {})[0]

    compress(job(tmp_path / "whole"))

    def stop(_what: str, _nbytes: int, units: int) -> None:
        if units == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(job(tmp_path / "stopped"), on_progress=stop)
    resumed = []
    compress(job(tmp_path / "stopped"), on_progress=lambda what, *_: resumed.append(what))
    assert "resumed" in resumed
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "stopped" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_fine_tune_without_codes_if_asked(tmp_path: Path) -> None:
    """Of a full fine-tune `--bits 0` keeps the directions, and tells what they leave."""
    pair = make_pair(tmp_path / "pair", **SHAPE)
    artifact = meswitch.compress(*pair, tmp_path / "artifact", bits=0, rank=32, keep_weak=True)
    linears = [entry for entry in artifact.manifest.tensors if entry.kind == "linear"]
    assert {(entry.bits, entry.rank, entry.factor_bits) for entry in linears} == {(0, 32, 8)}
    restore(artifact, Checkpoint.open(str(pair[0])), tmp_path / "restored", dtype=torch.float32)
    own, wanted, found = (tensors_of(folder) for folder in (pair[0], pair[1], tmp_path / "restored"))
    for entry in linears:
        delta = wanted[entry.name].float() - own[entry.name].float()
        error = (found[entry.name] - wanted[entry.name].float()).square().sum() / delta.square().sum()
        best = torch.linalg.svdvals(delta.double())[32:].square().sum() / delta.double().square().sum()
        assert entry.weight_error == pytest.approx(float(error), rel=1e-3)
        assert float(best) < float(error) < 1.1 * float(best)


def test_a_fine_tune_that_few_directions_do_not_hold_is_refused(tmp_path: Path) -> None:
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    pair = make_pair(tmp_path / "pair", heavy_columns=0, change_norms=False, equal=ends, **SHAPE)
    run = in_process("compress", "--base", pair[0], "--expert", pair[1], "--out", tmp_path / "out", "--bits", 0,
                     "--rank", 1)  # fmt: skip
    told = run.stderr + run.stdout
    assert ("nearer to the expert than the base is" in told) and "weight error of" in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "give --rank, 1 or more"),
        ({"code": "trellis"}, "--code: --bits 0"),
        ({"group_size": 32}, "--group-size: --bits 0"),
        ({"channel_scale": "rms"}, "--channel-scale: --bits 0"),
        ({"rounding": "feedback", "calibration": "0" * 64}, "--rounding: --bits 0"),
        ({"steps": "layerwise", "calibration": "0" * 64}, "--steps layerwise: --bits 0"),
        ({"steps": "distill", "calibration": "0" * 64}, "--steps distill: --bits 0"),
        ({"exact": True}, "--exact: --bits 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_belongs_to_codes_is_refused_without_them(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompressionSettings.with_defaults(bits=0, **settings)


def test_a_weight_that_is_no_number_is_named(base: Path, tmp_path: Path) -> None:
    expert = merge_lora(base, tmp_path / "merged")
    tensors = tensors_of(expert)
    tensors["model.layers.1.self_attn.k_proj.weight"][2, 3] = float("inf")
    safetensors.torch.save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1.*k_proj.*NaN or infinity"):
        rank_of(base, expert)
    fails(in_process("compress", "--base", base, "--expert", expert, "--out", tmp_path / "out"), 1, "NaN or infinity")
