"""What `trade_off` expects of settings, beside what `quantize` then does with them."""

from dataclasses import dataclass, replace

import pytest
import torch

from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import EmbeddingSensitivity, InputStatistics, LinearSensitivity
from meswitch_cli.delta.trade_off import MEASURED_ROWS, Options, trade_off

ROWS, COLUMNS, TOKENS = 320, 288, 12
OPTIONS = Options(
    ((0.25, "trellis"), (1, "trellis"), (1, "scalar"), (2, "scalar"), (4, "scalar")), ranks=(0, 8, 32), salient=(0, 4)
)
TEMPLATE = QuantizerSettings(steps="unbiased")


@dataclass(frozen=True)
class _Given:
    """Weights as they are given. Implements `Sensitivity`."""

    weights: torch.Tensor
    input_energy: torch.Tensor | None = None

    def of_rows(self, rows: slice) -> torch.Tensor:
        return self.weights[rows]

    def row_weights(self) -> torch.Tensor:
        return self.weights.sum(1)


def _pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(ROWS, COLUMNS, generator=generator)
    strong = torch.randn(ROWS, 12, generator=generator) @ torch.randn(12, COLUMNS, generator=generator)
    delta = torch.randn(ROWS, COLUMNS, generator=generator) + 0.6 * strong
    delta[:, [3, 100, 205]] *= 4
    return base, base + 0.01 * delta


def _linear(seed: int = 1) -> LinearSensitivity:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, TOKENS, COLUMNS, generator=generator)
    inputs[..., [7, 100]] *= 6
    gradients = torch.randn(3, TOKENS, ROWS, generator=generator) * torch.rand(ROWS, generator=generator)
    return LinearSensitivity(inputs, gradients)


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_expected_costs_are_those_of_quantize(weighted: bool) -> None:
    base, expert = _pair()
    linear = _linear()
    weights = linear.of_rows(slice(0, ROWS)) if weighted else torch.ones(ROWS, COLUMNS)
    energy = linear.input_energy if weighted else None
    found = trade_off(base, expert, OPTIONS, TEMPLATE, _Given(weights, energy))
    assert found is not None
    statistics = None if energy is None else InputStatistics(energy, None, 36)
    for settings, expected in zip(OPTIONS.settings(TEMPLATE), found, strict=True):
        stored, _ = quantize(base, expert, settings, statistics) or pytest.fail("they differ")
        real = float((weights * (expert - base - dequantize(stored)).square()).sum())
        # Factors that codes as fine as they have served are hardly rounded again, which is not reckoned with.
        closeness = 0.6 if settings.bits == 4 and settings.rank else 0.35
        assert expected == pytest.approx(real, rel=closeness), settings


def test_rows_that_are_not_measured_count_by_their_weights() -> None:
    assert ROWS > 2 * MEASURED_ROWS
    base, expert = _pair()
    sensitivity = _linear()
    some = trade_off(base, expert, OPTIONS, TEMPLATE, sensitivity)
    every = trade_off(base, expert, OPTIONS, TEMPLATE, sensitivity, every_row=True)
    assert some is not None
    assert every is not None
    assert some == pytest.approx(every, rel=0.25)


def test_more_bits_ranks_and_channels_cost_less() -> None:
    base, expert = _pair()
    found = trade_off(base, expert, OPTIONS, TEMPLATE, _linear())
    assert found is not None
    table = torch.tensor(found).view(len(OPTIONS.ranks), len(OPTIONS.codes), len(OPTIONS.salient))
    assert (table[..., 1] < table[..., 0]).all()
    bits = table[:, [0, 1, 3, 4]]
    assert (bits[:, 1:] < bits[:, :-1]).all()
    assert (table[1:, :3] < table[:-1, :3]).all()


def test_equal_weights_have_no_costs() -> None:
    base, _ = _pair()
    assert trade_off(base, base.clone(), OPTIONS, TEMPLATE, _linear()) is None


def test_damaged_weights_are_refused() -> None:
    base, expert = _pair()
    expert[5, 7] = torch.nan
    for options in (OPTIONS, replace(OPTIONS, ranks=(0,))):
        with pytest.raises(FloatingPointError):
            trade_off(base, expert, options, TEMPLATE, _linear())


def test_options_that_a_tensor_cannot_have_fall_away() -> None:
    options = Options(((1, "trellis"),), ranks=(0, 4, 16), salient=(0, 2, 32)).within((8, 40))
    assert options.ranks == (0, 4)
    assert options.salient == (0, 2)


def test_sensitivity_of_an_embedding_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 16, generator=generator)
    ids = torch.randint(50, (3, 9), generator=generator)
    ids[0, 3] = ids[0, 4]
    rows = torch.randn(3, 9, 16, generator=generator)
    head = LinearSensitivity(torch.randn(3, 9, 16, generator=generator), torch.randn(3, 9, 50, generator=generator))
    for tied in (None, head):
        expected = torch.zeros(50, 16)
        for window in range(3):
            own = weight.clone().requires_grad_()
            value = (own[ids[window]] * rows[window]).sum()
            if tied is not None:
                value = value + (tied.inputs[window] @ own.T * tied.gradients[window]).sum()
            (gradient,) = torch.autograd.grad(value, own)
            expected += gradient.square()
        expected /= 2 * 27
        sensitivity = EmbeddingSensitivity(ids, rows, 50, tied)
        found = torch.cat([sensitivity.of_rows(slice(0, 20)), sensitivity.of_rows(slice(20, 64))])
        torch.testing.assert_close(found, expected)
