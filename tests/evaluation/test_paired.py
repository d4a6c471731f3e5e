"""Statistics against known answers: other libraries, planted effects, coverage by simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from meswitch_cli.evaluation.paired import (
    binary_interval,
    compare_paired,
    holm,
    mcnemar_exact,
    mean_interval,
    minimum_detectable_effect,
    paired_bootstrap,
    student_95,
    with_holm,
)
from meswitch_cli.evaluation.statistics import quantile_by_document, ratio_standard_error


def outcomes(generator: np.random.Generator, n: int, lose: float, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores (model's, other's) of n documents; a document is lost or gained with these probabilities."""
    kind = generator.choice(4, size=n, p=[lose, gain, (1 - lose - gain) / 2, (1 - lose - gain) / 2])
    return np.isin(kind, (1, 2)).astype(float), np.isin(kind, (0, 2)).astype(float)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 2), (9, 1), (40, 60), (200, 150)])
def test_mcnemar_is_statsmodels(lost: int, gained: int) -> None:
    theirs = mcnemar([[10, lost], [gained, 10]], exact=True).pvalue if lost + gained else 1.0
    assert mcnemar_exact(lost, gained) == pytest.approx(theirs, rel=1e-9)


def test_holm_is_statsmodels() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 7, 30):
        values = generator.uniform(0, 0.2, size=size).tolist()
        assert holm(values) == pytest.approx(multipletests(values, method="holm")[1].tolist())


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 10, 50, 1000])
def test_student_quantile_is_scipy(degrees: int) -> None:
    assert student_95(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=5e-3)


def test_mean_interval_is_scipy() -> None:
    change = np.random.default_rng(1).normal(0.1, 1, size=25)
    found = mean_interval(change)
    theirs = scipy.stats.ttest_1samp(change, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-4)


def test_bootstrap_p_agrees_with_the_t_test_and_its_interval_with_scipy() -> None:
    change = np.random.default_rng(2).normal(0.2, 1, size=120)
    interval, p = paired_bootstrap(change)
    assert p == pytest.approx(scipy.stats.ttest_1samp(change, 0).pvalue, abs=0.02)
    theirs = scipy.stats.bootstrap((change,), np.mean, method="percentile", rng=0).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


@pytest.mark.parametrize(("lose", "gain"), [(0.02, 0.02), (0.1, 0.03), (0.05, 0.2), (0.0, 0.0)])
@pytest.mark.parametrize("n", [30, 200])
def test_binary_interval_covers_the_truth_as_often_as_it_says(lose: float, gain: float, n: int) -> None:
    generator = np.random.default_rng(n)
    kinds = generator.multinomial(n, [lose, gain, 1 - lose - gain], size=2000)
    covered = [
        binary_interval(int(lost), int(gained), n).low <= gain - lose <= binary_interval(int(lost), int(gained), n).high
        for lost, gained, _ in kinds
    ]
    assert np.mean(covered) >= 0.935  # the adjusted interval errs on the wide side where few pairs disagree


def test_score_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    found = [mean_interval(generator.exponential(1.0, size=60) - 0.7) for _ in range(2000)]
    assert 0.925 <= np.mean([item.low <= 0.3 <= item.high for item in found]) <= 0.965


def test_no_effect_is_found_no_more_often_than_one_time_in_twenty() -> None:
    generator = np.random.default_rng(4)
    found = [compare_paired(*outcomes(generator, 100, 0.08, 0.08)) for _ in range(400)]
    assert np.mean([item.verdict in ("worse", "better") for item in found]) <= 0.05


def test_an_effect_of_the_detectable_size_is_found_four_times_out_of_five() -> None:
    generator = np.random.default_rng(5)
    n, spread = 400, 0.2
    expected = minimum_detectable_effect(np.repeat([1.0, -1.0, 0.0], [40, 40, 320]), binary=True)
    lose, gain = (spread + expected) / 2, (spread - expected) / 2
    found = [compare_paired(*outcomes(generator, n, lose, gain)) for _ in range(400)]
    power = np.mean([item.verdict == "worse" for item in found])
    assert 0.72 <= power <= 0.88  # the exact test is a little below its nominal power


def test_planted_loss_is_called_worse_and_counted() -> None:
    theirs = np.ones(100)
    ours = theirs.copy()
    ours[:12] = 0
    found = compare_paired(ours, theirs)
    assert (found.lost, found.gained, found.verdict, found.test) == (12, 0, "worse", "mcnemar")
    assert found.difference.value == pytest.approx(-0.12)
    assert found.difference.high < 0


def test_few_documents_are_never_proof_of_no_difference() -> None:
    same = compare_paired(np.ones(20), np.ones(20))
    assert same.verdict == "n too small" and same.minimum_detectable_effect > 0.05
    many = compare_paired(np.ones(2000), np.ones(2000))
    assert many.verdict == "no difference beyond the margin"


def test_graded_scores_go_by_bootstrap() -> None:
    generator = np.random.default_rng(6)
    theirs = generator.uniform(0, 1, size=300)
    found = compare_paired(theirs - 0.05 + 0.05 * generator.normal(size=300), theirs)
    assert found.test == "bootstrap" and found.verdict == "worse"
    assert found.difference.low < -0.05 < found.difference.high
    assert found.minimum_detectable_effect == pytest.approx(2.8016 * 0.05 / math.sqrt(300), rel=0.15)


def test_holm_turns_a_lucky_difference_back() -> None:
    ours, theirs = np.ones(60), np.ones(60)
    ours[:7] = 0
    alone = compare_paired(ours, theirs)
    assert alone.verdict == "worse" and alone.p == pytest.approx(2 / 2**7)
    none = compare_paired(theirs, theirs)
    corrected = with_holm([alone, none, none, none, none])
    assert corrected[0].p_holm == pytest.approx(5 * alone.p) and corrected[0].verdict == "n too small"


def test_scores_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="2 scores against 3"):
        compare_paired([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="not finite"):
        compare_paired([float("nan")], [1.0])


def test_ratio_error_is_the_covariance_formula_and_the_error_of_a_mean() -> None:
    generator = np.random.default_rng(7)
    ours, reference = generator.normal(2, 1, size=500), generator.normal(1.8, 1, size=500)
    ours += reference
    error = ratio_standard_error(ours - reference, np.ones(500))
    covariance = np.cov(ours, reference)
    expected = math.sqrt((covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / 500)
    assert error == pytest.approx(expected, rel=1e-9)
    assert ratio_standard_error(ours, np.ones(500)) == pytest.approx(scipy.stats.sem(ours), rel=1e-9)
    assert ratio_standard_error([1.0], [2.0]) is None


def test_error_by_document_sees_what_tokens_share() -> None:
    """Tokens of a document share its mean: an error that took them for independent would be far too small."""
    generator = np.random.default_rng(8)
    found, errors = [], []
    for _ in range(400):
        counts = generator.integers(5, 40, size=30)
        means = generator.normal(1, 0.5, size=30)
        sums = counts * means + generator.normal(size=30) * np.sqrt(counts) * 0.2
        found.append(sums.sum() / counts.sum())
        errors.append(ratio_standard_error(sums, counts.astype(float)))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)


def test_quantile_by_document() -> None:
    values, documents = np.arange(100.0), np.repeat(np.arange(10), 10)
    found = quantile_by_document(values, documents, 0.9)
    assert found.value == np.quantile(values, 0.9) and found.low <= found.value <= found.high
    again = quantile_by_document(values, documents, 0.9)
    assert found == again
    with pytest.raises(ValueError, match="3 values, 2 documents"):
        quantile_by_document(np.ones(3), np.zeros(2, dtype=np.int64), 0.5)
