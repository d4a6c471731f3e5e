import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from meswitch_cli.estimates import Z_95, percentile, percentiles, wilson_interval
from meswitch_cli.router.train import measures


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (10, 10), (7, 10), (299, 300), (1, 1)])
def test_wilson_interval(successes: int, count: int) -> None:
    expected = proportion_confint(successes, count, method="wilson")
    assert wilson_interval(successes, count) == pytest.approx(expected, abs=1e-12)
    share = measures.proportion(successes, count)
    assert (share["low"], share["high"]) == pytest.approx(expected, abs=1e-6)
    assert (share["value"], share["prompts"]) == (successes / count, count)
    assert wilson_interval(0, 0) == (0, 1)


def test_the_quantile_is_the_normal_one() -> None:
    assert pytest.approx(norm.ppf(0.975), abs=1e-15) == Z_95


def test_percentiles_are_numpy_s() -> None:
    values = np.random.default_rng(0).exponential(size=37).tolist()
    for percent in (0, 5, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentiles(values, (50, 99)) == {"p50": percentile(values, 50), "p99": percentile(values, 99)}
    assert percentile([3.0], 99) == 3
