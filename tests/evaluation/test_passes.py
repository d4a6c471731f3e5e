"""Passes over real tiny models: resident, streamed and chunked give the figures of a plain forward."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import EvaluationError
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.evaluation.figures import TokenFigures
from meswitch_cli.evaluation.passes import Arithmetic, Failure, Mode, _room_for, choose_mode, compare_models
from meswitch_cli.evaluation.streaming import streamed_logits
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import make_pair

CPU = torch.device("cpu")
ITEMS = [
    EncodedItem((4, 9, 11, 30, 8, 2), 3),
    EncodedItem((5, 6, 7), 1),
    EncodedItem(tuple(range(4, 40)), 20),
    EncodedItem((9, 9, 4, 4, 12, 17, 33), 6),
]


def opened(path: Path) -> CheckpointWeights:
    return CheckpointWeights(Checkpoint.open(str(path)))


def compared(pair: tuple[Path, Path], scratch: Path, mode: Mode, budget: int = 1 << 30) -> list[TokenFigures]:
    base, expert = (opened(path) for path in pair)
    found = compare_models(expert, {"base": base}, ITEMS, Arithmetic(CPU, torch.float32, mode), scratch, budget=budget)[
        "base"
    ]
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_figures_are_those_of_transformers(tmp_path: Path, family: str, mode: Mode) -> None:
    pair = make_pair(tmp_path, family)
    found = compared(pair, tmp_path, mode)
    base, expert = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in pair)
    for item, figures in zip(ITEMS, found, strict=True):
        ids = torch.tensor([item.tokens])
        with torch.no_grad():
            ours, theirs = (
                torch.log_softmax(model(ids).logits[0, item.answer_start - 1 : -1].double(), -1)
                for model in (base, expert)
            )
        answer = item.answer[:, None]
        kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(figures["kl"], kl, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(figures["loss"], -ours.gather(1, answer)[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(figures["reference_loss"], -theirs.gather(1, answer)[:, 0], rtol=1e-4, atol=1e-5)
        change = (ours.exp() - theirs.exp()).gather(1, answer)[:, 0]
        torch.testing.assert_close(figures["probability_change"], change, rtol=1e-3, atol=1e-6)
        assert torch.equal(figures["agreed"], (ours.argmax(-1) == theirs.argmax(-1)).double())


def test_chunks_change_nothing_and_leave_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole = compared(pair, tmp_path, "resident")
    chunked = compared(pair, tmp_path, "resident", budget=20 * 268 * 4)
    for left, right in zip(whole, chunked, strict=True):
        torch.testing.assert_close(left["kl"], right["kl"], rtol=1e-3, atol=1e-6)
    assert not list(tmp_path.iterdir())


def test_room_for_the_reference_is_taken_before_it_is_written(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse file would end the process with a signal where the disk fills up."""
    file = tmp_path / "reference"
    _room_for(file, (300, 1000))
    assert file.stat().st_size == 1_200_000 <= 512 * file.stat().st_blocks

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(EvaluationError, match="no room for the reference's logits: No space left"):
        compared(pair, tmp_path, "resident")
    assert [path.name for path in tmp_path.iterdir()] == ["reference"]


def test_streaming_in_several_groups(pair: tuple[Path, Path]) -> None:
    weights = opened(pair[1])
    whole = dict(streamed_logits(weights, ITEMS, CPU, torch.float32))
    groups = dict(streamed_logits(weights, ITEMS, CPU, torch.float32, group_tokens=40))
    assert whole.keys() == groups.keys() == set(range(4))
    for index, logits in whole.items():
        torch.testing.assert_close(groups[index], logits, rtol=1e-4, atol=1e-5)


def test_a_damaged_model_is_named_and_does_not_stop_the_others(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class Damaged(CheckpointWeights):
        def read(self, name: str) -> torch.Tensor:
            value = super().read(name)
            return value * float("nan") if name == "model.norm.weight" else value

    base, expert = (opened(path) for path in pair)
    found = compare_models(
        expert,
        {"damaged": Damaged(base.checkpoint), "base": base},
        ITEMS,
        Arithmetic(CPU, torch.float32, "resident"),
        tmp_path,
    )
    assert isinstance(found["base"], list) and len(found["base"]) == len(ITEMS)
    failure = found["damaged"]
    assert isinstance(failure, Failure)
    assert str(pair[0]) in failure.reason and "item 2 are not finite" in failure.reason


def test_added_tokens_are_compared_over_the_shared_vocabulary(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, added_rows=4)
    found = compared(pair, tmp_path, "resident")
    assert all(torch.isfinite(item["kl"]).all() and (item["kl"] > -1e-6).all() for item in found)
    base, expert = (opened(path) for path in pair)
    new_token = [EncodedItem((4, 9, 270, 5), 2)]
    failed = compare_models(expert, {"base": base}, new_token, Arithmetic(CPU, torch.float32, "resident"), tmp_path)[
        "base"
    ]
    assert isinstance(failed, Failure) and "which the expert added" in failed.reason


def test_a_model_that_does_not_fit_is_streamed(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = opened(pair[1])
    assert choose_mode([weights], CPU, torch.float32) == "resident"
    monkeypatch.setattr("meswitch_cli.evaluation.passes.available_bytes", lambda device: 1000)
    assert choose_mode([weights], CPU, torch.float32) == "stream"
