"""Figures of merit against hand-worked values and against scipy and statsmodels."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import mannwhitneyu

from meswitch_cli.errors import RouterError
from meswitch_cli.router.decide.gates import (
    confidence_threshold,
    distance_threshold,
    fit_distances,
    risk_coverage,
)
from meswitch_cli.router.decide.head import PENALTIES, Scaling, cross_entropy, fit_head
from meswitch_cli.router.decide.temperature import fit_temperature
from meswitch_cli.router.store.features import PARTS, FeatureStore
from meswitch_cli.router.train import measures
from meswitch_cli.router.train.generalising import Known, fit_generalising


def test_calibration_figures_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    truth = np.array([0, 1, 0])
    # 0.9 falls into the bin [0.867, 0.933): half right; 0.6 into another: right.
    assert measures.calibration_error(probabilities, truth) == pytest.approx(2 / 3 * 0.4 + 1 / 3 * 0.4)
    assert measures.brier_score(probabilities, truth) == pytest.approx((0.02 + 1.62 + 0.32) / 3)
    assert measures.negative_log_likelihood(probabilities, truth) == pytest.approx(-np.log([0.9, 0.1, 0.6]).mean())


def test_auroc_is_mann_whitney() -> None:
    generator = np.random.default_rng(0)
    held_in, null = generator.normal(0, 1, 50).round(1), generator.normal(1, 1, 70).round(1)
    expected = mannwhitneyu(null, held_in).statistic / (50 * 70)
    assert measures.auroc(held_in, null) == pytest.approx(expected)
    assert measures.auroc(np.zeros(3), np.ones(4)) == 1
    assert measures.false_positive_rate(np.arange(101.0), np.array([10.0, 94.0, 95.5, 200.0])) == 0.5


def test_confusion_counts_fallbacks() -> None:
    rows = measures.confusion(["a", "fallback", "b", "fallback"], ["a", "a", None, None], ["a", "b"])
    assert rows == {
        "a": {"a": 1, "b": 0, "fallback": 1},
        "b": {"a": 0, "b": 0, "fallback": 0},
        "null": {"a": 0, "b": 1, "fallback": 1},
    }
    shares = measures.per_label(["a", "b", "b"], ["a", "a", "b"], ["a", "b"])
    assert (shares["a"]["precision"], shares["a"]["recall"]) == (1, 0.5)
    assert (shares["b"]["precision"], shares["b"]["recall"]) == (0.5, 1)


def test_risk_coverage_and_its_threshold() -> None:
    confidence = [0.99, 0.95, 0.9, 0.9, 0.7, 0.6, 0.4]
    correct = [True, True, True, False, True, False, True]
    points = risk_coverage(confidence, correct)
    assert [point.coverage for point in points] == pytest.approx([1 / 7, 2 / 7, 4 / 7, 5 / 7, 6 / 7, 1])
    assert [point.precision for point in points] == pytest.approx([1, 1, 3 / 4, 4 / 5, 4 / 6, 5 / 7])
    # Fewer than half of the prompts are too few to read a precision off.
    with pytest.raises(RouterError, match=r"the best is 0\.800 for 71% of them"):
        confidence_threshold(confidence, correct, 0.95)
    assert confidence_threshold(confidence, correct, 0.78) == 0.7
    assert confidence_threshold(confidence, correct, 0.75) == 0.7
    assert confidence_threshold(confidence, correct, 0.6) == 0.5
    with pytest.raises(RouterError, match=r"no threshold reaches a precision of 0\.95 on 2 calibration prompts"):
        confidence_threshold([0.9, 0.8], [False, True], 0.95)


def blobs(count: int, seed: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping Gaussian classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.0 * torch.randn(3, size, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % 3
    return centres[labels] + 1.5 * torch.randn(count, size, generator=generator), labels


def test_head_reaches_the_optimum_and_is_the_same_twice() -> None:
    features, labels = blobs(240, 0)
    targets = torch.eye(3)[labels]
    head = fit_head(features, targets, 1e-2)
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    loss = cross_entropy(features @ weight.T + bias, targets) + 5e-3 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None and bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4 and float(bias.grad.abs().max()) < 1e-4
    again = fit_head(features, targets, 1e-2)
    assert torch.equal(head.weight, again.weight)


def test_penalty_is_chosen_on_validation() -> None:
    features, labels = blobs(60, 0)
    validation, validation_labels = blobs(300, 1)
    targets, validation_targets = torch.eye(3)[labels], torch.eye(3)[validation_labels]
    every = torch.cat([labels, validation_labels])
    parts = torch.tensor([PARTS.index("train")] * 60 + [PARTS.index("validation")] * 300, dtype=torch.uint8)
    rest = [torch.arange(360), torch.ones(360), torch.full((360,), -1), torch.full((360,), -1)]
    points, wanted = torch.cat([features, validation]), torch.cat([targets, validation_targets])
    store = FeatureStore(points, wanted, every, parts, *rest)
    head = fit_generalising(Known.of(store, 3), 3).head
    loss = float(cross_entropy(head(validation), validation_targets))
    others = {
        value: float(cross_entropy(fit_head(features, targets, value)(validation), validation_targets))
        for value in PENALTIES
    }
    assert loss == pytest.approx(min(others.values()), abs=1e-4)
    assert loss < others[3e-4] - 0.01  # 36 parameters on 60 overlapping points need a penalty


def test_scalings() -> None:
    features = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, 6.0]])
    standard = Scaling.standard(features)(features)
    assert torch.allclose(standard[:, [0, 2]].std(0), torch.ones(2)) and torch.equal(standard[:, 1], torch.zeros(2))
    assert float(Scaling.overall(features)(features).square().mean()) == pytest.approx(1)


def test_temperature_is_the_best_one_and_never_reorders() -> None:
    features, labels = blobs(300, 3)
    head = fit_head(features[:150], torch.eye(3)[labels[:150]], 1e-3)
    scores = 5 * head(features[150:])  # far too sure
    held_out = labels[150:]
    temperature = fit_temperature(scores, held_out)
    missing = 1 / 152
    targets = torch.where(torch.eye(3)[held_out] > 0, 1 - missing, missing / 2)
    best = minimize_scalar(
        lambda log: float(cross_entropy(scores / np.exp(log), targets)), bounds=(-4, 6), method="bounded"
    )
    assert np.log(temperature) == pytest.approx(best.x, abs=0.01)
    before = torch.softmax(scores, 1).double().numpy()
    after = torch.softmax(scores / temperature, 1).double().numpy()
    truth = held_out.numpy()
    assert measures.calibration_error(after, truth) < measures.calibration_error(before, truth) / 2
    assert (after.argmax(1) == before.argmax(1)).all()


def test_scores_without_a_mistake_do_not_end_in_certainty() -> None:
    scores = torch.tensor([[9.0, 0.0], [0.0, 9.0]] * 10)
    temperature = fit_temperature(scores, torch.tensor([0, 1] * 10))
    # Platt's target with 20 prompts is 21/22.
    assert float(torch.softmax(scores / temperature, 1).max()) == pytest.approx(21 / 22, abs=1e-3)


def test_distance_is_mahalanobis() -> None:
    """With every direction but one kept, and noise that is the same in all, it is the textbook's distance."""
    features, labels = blobs(3000, 0, size=6)
    gate = fit_distances(features, labels, 3, seed=0)
    centred = features - gate.centres[labels]
    precision = torch.linalg.inv(centred.T @ centred / (len(features) - 3))
    offsets = features[:40, None, :] - gate.centres
    exact = torch.einsum("ncd,de,nce->nc", offsets, precision, offsets).amin(1) / 6
    assert torch.allclose(gate.distances(features[:40]), exact, rtol=5e-3)
    assert torch.equal(gate.distances(features), fit_distances(features, labels, 3, seed=0).distances(features))


def test_distance_threshold() -> None:
    held_in = torch.arange(1000.0)
    assert distance_threshold(held_in, None) == pytest.approx(989.01)
    # Every null prompt lies beyond 960: refusing them all costs 4 % of the held-in ones.
    assert distance_threshold(held_in, torch.full((50,), 960.5)) == pytest.approx(960, abs=1)
    # None can be refused within what the gate may cost.
    assert distance_threshold(held_in, torch.full((50,), 100.0)) == pytest.approx(989, abs=1)
