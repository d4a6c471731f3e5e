"""What a delta says of its fine-tune: figures by hand, kinds on models made for them, doubts about the base."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from command_line import fails, in_process
from transformers import LlamaConfig, LlamaForCausalLM

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.fine_tune import FineTune, describe_fine_tune, kind_of, rounding_energy
from meswitch_cli.errors import CheckpointError
from zoo.tiny import Pair, make_pair

WIDTH = 256
Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def described(base: LlamaForCausalLM, folder: Path, change: Change, dtype: torch.dtype = torch.bfloat16) -> FineTune:
    """A fine-tune whose linears are what `change` makes of the base's, fp32 `[out, in]`."""
    base.config.dtype = torch.bfloat16
    base.save_pretrained(folder / "base")
    expert = LlamaForCausalLM(base.config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: (change(name, value.float(), generator) if "_proj" in name else value).to(dtype)
        for name, value in base.state_dict().items()
    }
    expert.load_state_dict(state)
    expert.config.dtype = dtype
    expert.save_pretrained(folder / "expert")
    return describe_fine_tune(Checkpoint.open(str(folder / "base")), Checkpoint.open(str(folder / "expert")))


def scaled(update: torch.Tensor, weight: torch.Tensor, share: float) -> torch.Tensor:
    return weight + update * (share * weight.norm() / update.norm())


def low_rank(rank: int, share: float) -> Change:
    def change(_: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        left = torch.randn(weight.shape[0], rank, generator=generator)
        return scaled(left @ torch.randn(rank, weight.shape[1], generator=generator), weight, share)

    return change


def full_rank(share: float) -> Change:
    return lambda _, weight, generator: scaled(torch.randn(weight.shape, generator=generator), weight, share)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (low_rank(16, 0.01), "lora"),
        (low_rank(64, 0.01), "lora"),
        (low_rank(16, 0.003), "lora"),
        (full_rank(0.005), "full"),
        (full_rank(3e-4), "sparse"),
        (full_rank(0.05), "pretraining"),
    ],
    ids=["lora16", "lora64", "lora16-small", "full", "sparse", "pretraining"],
)
def test_kinds(base: LlamaForCausalLM, tmp_path: Path, change: Change, kind: str) -> None:
    found = described(base, tmp_path, change)
    assert found.kind == kind and found.warnings == () and found.sampled == 7
    assert (found.base_dtype, found.expert_dtype, found.added_tokens) == ("bfloat16", "bfloat16", 0)
    # One embedding and three norms are as they were.
    assert (found.tensors, found.unchanged_tensors) == (11, 4)


def test_a_lora_in_fp32_has_no_rounding_to_hide_in(base: LlamaForCausalLM, tmp_path: Path) -> None:
    found = described(base, tmp_path, low_rank(16, 0.003), torch.float32)
    assert found.kind == "lora" and found.leading_energy == pytest.approx(1, abs=1e-3)
    assert found.relative_delta == pytest.approx(0.003, rel=1e-3) and found.expert_dtype == "float32"
    assert found.unchanged < 0.6  # most of what moved is seen in bf16 too


def test_figures_by_hand(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Every second row twice as large: half the weights unchanged, the delta as large as half the weights."""

    def change(_: str, weight: torch.Tensor, __: torch.Generator) -> torch.Tensor:
        return weight * torch.tensor([1.0, 2.0]).repeat(len(weight) // 2)[:, None]

    found = described(base, tmp_path, change)
    assert found.unchanged == pytest.approx(0.5, abs=1e-3) and found.relative_delta == pytest.approx(0.5**0.5, rel=0.02)
    assert found.leading_energy is not None and found.lora_energy is not None
    assert 0.125 < found.leading_energy < found.lora_energy < 1
    assert (
        found.kind == "pretraining" and len(found.warnings) == 1 and "another version of the base" in found.warnings[0]
    )


def test_nothing_changed(base: LlamaForCausalLM, tmp_path: Path) -> None:
    found = described(base, tmp_path, lambda _, weight, __: weight)
    assert found.kind == "none" and found.unchanged == 1 and found.relative_delta == 0
    assert found.leading_energy is None and found.rounding is None and found.unchanged_tensors == found.tensors


def test_rounding_energy() -> None:
    """bf16 has steps of 2^-7 between 1 and 2, of 2^-8 between 1/2 and 1; fp16 of 2^-10 between 1 and 2."""
    values = torch.tensor([1.5, -0.75])
    assert rounding_energy(values, torch.bfloat16) == pytest.approx((2.0**-14 + 2.0**-16) / 12)
    assert rounding_energy(values[:1], torch.float16) == pytest.approx(2.0**-20 / 12)
    drawn = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    error = float((drawn.bfloat16().float() - drawn).double().square().sum())
    assert rounding_energy(drawn, torch.bfloat16) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    ("unchanged", "relative", "rank", "kind"),
    [
        (0.341, 0.00447, None, "full"),
        (0.314, 0.00484, None, "full"),
        (0.426, 0.00283, None, "full"),
        (0.505, 0.00234, None, "full"),
        (0.453, 0.00311, 16, "lora"),
        (0.95, 0.001, 16, "lora"),
        (0.95, 0.001, None, "sparse"),
        (0.2, 0.05, 64, "lora"),
        (0.2, 0.05, None, "pretraining"),
        (1.0, 0.0, None, "none"),
    ],
)
def test_kinds_of_figures(unchanged: float, relative: float, rank: int | None, kind: str) -> None:
    """Figures of real fine-tunes, and of LoRAs of a few projections, which leave most weights alone."""
    assert kind_of(unchanged, relative, rank) == kind


def test_a_base_without_a_chat_template_is_doubted(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    assert (pair[1] / "chat_template.jinja").is_file()
    same = describe_fine_tune(*(Checkpoint.open(str(path)) for path in pair))
    assert not any("chat template" in warning for warning in same.warnings)
    (pair[0] / "chat_template.jinja").unlink()
    other = describe_fine_tune(*(Checkpoint.open(str(path)) for path in pair))
    assert any("chat template" in warning and str(pair[0]) in warning for warning in other.warnings)


def test_a_weight_that_is_no_number_is_named(base: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"q_proj.*NaN or infinity"):
        described(base, tmp_path, lambda name, weight, _: weight * (float("nan") if "q_proj" in name else 1))


def test_the_command(pair: Pair, tmp_path: Path) -> None:
    found = describe_fine_tune(*(Checkpoint.open(str(path)) for path in pair))
    shown = in_process("inspect", "--base", pair[0], "--expert", pair[1], "--json")
    assert shown.returncode == 0, shown.stderr
    value = json.loads(shown.stdout)
    expected = json.loads(json.dumps({"base": str(pair[0]), "expert": str(pair[1])} | asdict(found)))
    assert {name: value[name] for name in expected} == expected and value["suggestion"]
    text = in_process("inspect", "--base", pair[0], "--expert", pair[1])
    assert f"looks like {value['suggestion']}" in text.stdout and "||delta||" in text.stdout
    page = (Path(__file__).parents[2] / "docs" / "commands" / "inspect.md").read_text()
    assert all(f"`{name}`" in page for name in value)
    for arguments in ((), ("--base", pair[0]), (pair[0], "--base", pair[0], "--expert", pair[1])):
        fails(in_process("inspect", *arguments), 2, "give an artifact, or --base and --expert")
    fails(in_process("inspect", "--base", pair[0], "--expert", pair[1], "--plot", tmp_path / "x.svg"), 2, "--plot")
