import itertools
from dataclasses import replace

import pytest
import torch

from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics


def _weights(rows: int = 48, columns: int = 96, heavy: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(rows, columns, generator=generator) * 0.05).bfloat16()
    delta = torch.randn(rows, columns, generator=generator) * 1e-3
    delta[:, torch.randperm(columns, generator=generator)[:heavy]] *= 8
    expert = base.float() + delta
    return base.float(), expert, expert - base.float()


def _statistics(columns: int = 96) -> InputStatistics:
    inputs = torch.randn(400, columns, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 4, columns)
    return InputStatistics(inputs.square().sum(0), inputs.T @ inputs, 400)


CASES = list(itertools.product((1, 2, 4), (0, 8), (0, 64), ("none", "rms"), ("nearest", "feedback")))


@pytest.mark.parametrize(("bits", "salient", "group_size", "scale", "rounding"), CASES)
@pytest.mark.parametrize("steps", ["least-squares", "unbiased", "output-unbiased", "layerwise"])
def test_reported_error_is_the_error_of_what_is_stored(bits, salient, group_size, scale, rounding, steps) -> None:
    base, expert, delta = _weights()
    settings = QuantizerSettings(bits, salient, group_size, scale, rounding, steps)
    result = quantize(base, expert, settings, _statistics())
    assert result is not None
    quantized, error = result
    difference = delta - dequantize(quantized)
    energy = _statistics().energy
    assert error.delta_energy == pytest.approx(float(delta.square().sum()), rel=1e-5)
    assert error.weight_error == pytest.approx(float(difference.square().sum() / delta.square().sum()), rel=1e-4)
    expected = float((difference.square() * energy).sum() / (delta.square() * energy).sum())
    assert error.output_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("bits", "textbook"), [(1, 0.363), (2, 0.119), (4, 0.0115)])
def test_error_of_a_gaussian_delta_is_the_textbook_error(bits: int, textbook: float) -> None:
    base, expert, _ = _weights(256, 512, heavy=0)
    _, error = quantize(base, expert, QuantizerSettings(bits, 0, steps="least-squares"))
    assert error.weight_error == pytest.approx(textbook, rel=0.03)
    _, error = quantize(base, expert, QuantizerSettings(bits, 0, steps="unbiased"))
    assert error.weight_error == pytest.approx(
        textbook / (1 - textbook), rel=0.04
    )  # 1/cos^2 - 1, with cos^2 = 1 - textbook


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_salient_channels_are_exact_to_sixteen_bits(bits: int) -> None:
    base, expert, delta = _weights()
    quantized, _ = quantize(base, expert, QuantizerSettings(bits, 8))
    index = quantized.salient_channels
    assert quantized.salient_index.dtype == torch.int32 and index.tolist() == sorted(index.tolist())
    torch.testing.assert_close(
        dequantize(quantized)[:, index], delta[:, index], rtol=0, atol=float(delta.abs().max()) * 2**-10
    )


def test_salient_channels_are_those_whose_rounding_costs_most() -> None:
    base, expert, delta = _weights(heavy=3)
    free, _ = quantize(base, expert, QuantizerSettings(2, 3))
    heaviest = delta.square().sum(0).topk(3).indices.sort().values
    assert free.salient_index.tolist() == heaviest.tolist()
    energy = torch.ones(96)
    energy[[5, 50, 77]] = 1e9
    seen, _ = quantize(base, expert, QuantizerSettings(2, 3), InputStatistics(energy, None, 1))
    assert seen.salient_index.tolist() == [5, 50, 77]


def test_steps_are_fitted_without_the_salient_channels() -> None:
    base, expert, _ = _weights()
    settings = QuantizerSettings(2, 3)
    before, _ = quantize(base, expert, settings)
    wild = expert.clone()
    wild[:, before.salient_channels] += 5.0
    after, _ = quantize(base, wild, settings)
    assert torch.equal(before.steps, after.steps)


def test_unbiased_delta_keeps_its_length_along_the_delta() -> None:
    base, expert, delta = _weights()
    for bits in (1, 2, 4):
        quantized, _ = quantize(base, expert, QuantizerSettings(bits, 0))
        torch.testing.assert_close((dequantize(quantized) * delta).sum(1), delta.square().sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("known", ["gram", "inputs"])
@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
@pytest.mark.parametrize(("salient", "group_size", "scale"), [(0, 0, "none"), (8, 0, "rms"), (8, 64, "none")])
def test_output_unbiased_delta_keeps_its_outputs_projection(
    known: str, rounding: str, salient: int, group_size: int, scale: str
) -> None:
    """<d_hat, d> = <d, d> of the outputs on the inputs, over the channels that are not salient."""
    base, expert, delta = _weights()
    inputs = torch.randn(40, 96, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.2, 4, 96)
    gram = inputs.T @ inputs
    whole = InputStatistics(inputs.square().sum(0), gram if known == "gram" or rounding == "feedback" else None, 40)
    statistics = replace(whole, inputs=inputs) if known == "inputs" else whole
    for bits in (1, 2, 4):
        settings = QuantizerSettings(bits, salient, group_size, scale, rounding, "output-unbiased")
        quantized, _ = quantize(base, expert, settings, statistics)
        rest = torch.ones(96).index_fill(0, quantized.salient_channels, 0.0)
        seen = (delta * rest) @ gram
        wanted, kept = (seen * delta * rest).sum(), (seen * dequantize(quantized) * rest).sum()
        torch.testing.assert_close(kept, wanted, rtol=2e-3, atol=0)
        plain, _ = quantize(base, expert, replace(settings, steps="unbiased"), statistics)
        assert not torch.equal(plain.steps, quantized.steps) and torch.equal(plain.codes, quantized.codes)


@pytest.mark.parametrize(
    "statistics",
    [None, InputStatistics(torch.zeros(96), None, 1), InputStatistics(torch.zeros(96), torch.zeros(96, 96), 1)],
)
def test_where_inputs_are_unknown_or_zero_output_unbiased_is_unbiased(statistics: InputStatistics | None) -> None:
    base, expert, _ = _weights()
    found, plain = (
        quantize(base, expert, QuantizerSettings(2, 8, steps=steps), statistics)[0]
        for steps in ("output-unbiased", "unbiased")
    )
    assert torch.equal(found.steps, plain.steps) and torch.equal(found.codes, plain.codes)


def test_blocks_of_a_large_tensor_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert, _ = _weights(rows=200)
    settings, statistics = QuantizerSettings(2, 8, steps="output-unbiased"), _statistics()
    whole, _ = quantize(base, expert, settings, statistics)
    monkeypatch.setattr("meswitch_cli.delta.sweep.BLOCK_ELEMENTS", 96 * 3)
    sampled, _ = quantize(base, expert, settings, statistics)
    ratios = sampled.steps / whole.steps
    assert torch.equal(sampled.codes, whole.codes)
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))
    assert 0.95 < float(ratios[0]) < 1.05 and float(ratios[0]) != 1


def test_layerwise_beats_other_steps_on_the_output() -> None:
    base, expert, delta = _weights()
    statistics = _statistics()

    def output_error(steps: str) -> float:
        quantized, _ = quantize(base, expert, QuantizerSettings(2, 0, steps=steps), statistics)
        difference = delta - dequantize(quantized)
        return float(((difference @ statistics.gram) * difference).sum())

    assert output_error("layerwise") <= output_error("least-squares") * (1 + 1e-5)
    assert output_error("layerwise") < output_error("unbiased")


def test_rows_do_not_depend_on_the_block_they_fall_in(monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert, _ = _weights(rows=50)
    whole, _ = quantize(base, expert, QuantizerSettings(2, 4))
    monkeypatch.setattr("meswitch_cli.delta.sweep.BLOCK_ELEMENTS", 96 * 7)
    blocked, _ = quantize(base, expert, QuantizerSettings(2, 4))
    assert torch.equal(whole.codes, blocked.codes)
    assert torch.equal(whole.salient_index, blocked.salient_index)
    torch.testing.assert_close(whole.steps, blocked.steps)


def test_same_input_same_bytes() -> None:
    base, expert, _ = _weights()
    first, _ = quantize(base, expert, QuantizerSettings(1, 8, channel_scale="rms"))
    second, _ = quantize(base, expert, QuantizerSettings(1, 8, channel_scale="rms"))
    for name in ("codes", "steps", "salient_index", "salient_value", "channel_scale"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("shape", [(1, 32), (5, 33), (7, 1), (64, 100)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator)
    expert = base + 0.01 * torch.randn(shape, generator=generator)
    quantized, error = quantize(base, expert, QuantizerSettings(4, 0, group_size=32))
    assert dequantize(quantized).shape == shape
    assert error.weight_error < 0.03


def test_equal_weights_have_no_delta() -> None:
    base, _, _ = _weights()
    assert quantize(base, base.clone(), QuantizerSettings()) is None


def test_zero_rows_and_columns_stay_zero() -> None:
    base, expert, _ = _weights()
    expert[3], expert[:, 10] = base[3], base[:, 10]
    for settings in (QuantizerSettings(2, 4), QuantizerSettings(1, 0, channel_scale="rms")):
        quantized, _ = quantize(base, expert, settings)
        assert torch.isfinite(dequantize(quantized)).all()
        assert (dequantize(quantized)[3] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "expert"])
def test_non_finite_weights_are_refused(bad: float, where: str) -> None:
    base, expert, _ = _weights()
    (base if where == "base" else expert)[2, 3] = bad
    with pytest.raises(FloatingPointError):
        quantize(base, expert, QuantizerSettings())


@pytest.mark.parametrize(
    "values",
    [{"bits": 3}, {"salient": -1}, {"group_size": 33}, {"channel_scale": "max"}, {"rounding": "up"}, {"steps": "best"}],
)
def test_impossible_settings_are_refused(values: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(values.values())))):
        QuantizerSettings(**values)


def test_too_many_salient_channels_and_missing_statistics_are_refused() -> None:
    base, expert, _ = _weights()
    with pytest.raises(ValueError, match="97 salient"):
        quantize(base, expert, QuantizerSettings(2, 97))
    with pytest.raises(ValueError, match="calibration"):
        quantize(base, expert, QuantizerSettings(2, 0, rounding="feedback"))
