from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from meswitch_cli.evaluation.baselines.bitdelta import bitdelta_start
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.evaluation.statistics import ratio_of_sums
from zoo.compare import compare, reference_logits
from zoo.tiny import make_pair

ITEMS = [
    EncodedItem((4, 9, 11, 30, 8, 2), 3),
    EncodedItem((5, 6, 7), 1),
    EncodedItem(tuple(range(4, 40)), 20),
    EncodedItem((9, 9, 4, 4, 12, 17, 33), 6),
]


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits after the head
def test_figures_are_those_of_one_item_at_a_time(tmp_path: Path, family: str) -> None:
    base, expert = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in make_pair(tmp_path, family)
    )
    found = compare(reference_logits(expert, ITEMS), base, ITEMS)
    for item, figures in zip(ITEMS, found, strict=True):
        ids = torch.tensor([item.tokens])
        with torch.no_grad():
            ours, theirs = (
                torch.log_softmax(model(ids).logits[0, item.answer_start - 1 : -1], -1) for model in (base, expert)
            )
        kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
        assert len(figures["kl"]) == len(item.tokens) - item.answer_start
        assert float(figures["kl"].sum()) == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        loss = float(-ours.gather(1, item.answer[:, None]).sum())
        assert float(figures["loss"].sum()) == pytest.approx(loss, rel=1e-4)
        assert int(figures["agreed"].sum()) == int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def test_a_model_has_no_divergence_from_itself(pair: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    for figures in compare(reference_logits(model, ITEMS), model, ITEMS):
        assert abs(float(figures["kl"].sum())) < 1e-6 and figures["agreed"].all()


def test_broken_logits_are_named(pair: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    reference = reference_logits(model, ITEMS)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        compare(reference, model, ITEMS)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        bottom = torch.rand(80, generator=generator) + 0.5
        top = bottom * 0.3 + 0.1 * torch.randn(80, generator=generator)
        estimate = ratio_of_sums(top.tolist(), bottom.tolist(), seed=trial, resamples=1000)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_ratio_of_sums_is_exact_where_items_agree() -> None:
    estimate = ratio_of_sums([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="2 numerators, 1 denominators"):
        ratio_of_sums([1, 2], [1])


def test_bitdelta_is_sign_times_mean_magnitude() -> None:
    delta = torch.tensor([[0.5, -1.5], [2.0, 0.0]])
    assert bitdelta_start(delta).tolist() == [[1.0, -1.0], [1.0, -1.0]]
