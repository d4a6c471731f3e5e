import itertools
from dataclasses import replace

import pytest
import torch

from meswitch_cli.delta.low_rank import leading_directions, rounded, vectors_of
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.delta.stored import expected_entry


def _delta(rows: int = 60, columns: int = 96, strong: int = 3, loud: int = 0) -> torch.Tensor:
    """Noise with a few strong directions, and a few loud columns from the seventh on."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(rows, columns, generator=generator)
    scale = torch.tensor([6.0, 4.0, 3.0])[:strong, None]
    delta += torch.randn(rows, strong, generator=generator) @ (
        scale * torch.randn(strong, columns, generator=generator)
    )
    delta[:, 7 : 7 + loud] *= 6
    return delta * 1e-3


def _statistics(columns: int = 96) -> InputStatistics:
    inputs = torch.randn(400, columns, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 4, columns)
    return InputStatistics(inputs.square().sum(0), inputs.T @ inputs, 400)


@pytest.mark.parametrize(
    ("bits", "salient", "group_size", "scale", "rounding"),
    itertools.product((1, 2, 4), (0, 8), (0, 64), ("none", "rms"), ("nearest", "feedback")),
)
@pytest.mark.parametrize("steps", ["unbiased", "output-unbiased", "layerwise"])
def test_reported_error_is_the_error_of_what_is_stored(bits, salient, group_size, scale, rounding, steps) -> None:
    delta = _delta()
    settings = QuantizerSettings(bits, salient, group_size, scale, rounding, steps, rank=5)
    quantized, error = quantize(torch.zeros_like(delta), delta, settings, _statistics())
    difference, energy = delta - dequantize(quantized), _statistics().energy
    assert error.delta_energy == pytest.approx(float(delta.square().sum()), rel=1e-5)
    assert error.weight_error == pytest.approx(float(difference.square().sum() / delta.square().sum()), rel=1e-3)
    expected = float((difference.square() * energy).sum() / (delta.square() * energy).sum())
    assert error.output_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("bits", [0, 2])
def test_as_few_directions_as_one(bits: int, rank: int, factor_bits: int) -> None:
    delta = _delta(strong=1)
    settings = QuantizerSettings(bits, salient=0, rank=rank, factor_bits=factor_bits)
    quantized, error = quantize(torch.zeros_like(delta), delta, settings)
    difference = delta - dequantize(quantized)
    assert error.weight_error == pytest.approx(float(difference.square().sum() / delta.square().sum()), rel=1e-3)
    entry = expected_entry(settings, tuple(delta.shape))
    assert entry.problem() is None and quantized.nbytes == entry.expected_nbytes(2)


@pytest.mark.parametrize("factor_bits", [8, 16])
def test_directions_alone_are_the_best_approximation(factor_bits: int) -> None:
    """Eckart and Young; beside what rounding the factors costs."""
    delta = _delta()
    quantized, error = quantize(
        torch.zeros_like(delta), delta, QuantizerSettings(0, salient=0, rank=5, factor_bits=factor_bits), _statistics()
    )
    left_over = float(torch.linalg.svdvals(delta.double())[5:].square().sum() / delta.double().square().sum())
    assert error.weight_error == pytest.approx(left_over, rel=0.02) and error.output_error > 0
    assert (quantized.codes, quantized.salient_index, quantized.bits) == (None, None, 0)


def test_nothing_is_stored_of_no_delta_without_codes() -> None:
    zero = torch.zeros(12, 40)
    assert quantize(zero, zero, QuantizerSettings(0, salient=0, rank=2, factor_bits=8)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"salient": 8}, "salient"),
        ({"group_size": 32}, "group size"),
        ({"channel_scale": "rms"}, "channel scale"),
        ({"rounding": "feedback"}, "rounding"),
        ({"steps": "layerwise"}, "steps"),
        ({"code": "trellis"}, "code"),
    ],
    ids=str,
)
def test_what_belongs_to_codes_is_refused_without_them(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizerSettings(**{"bits": 0, "salient": 0, "rank": 4} | settings)


@pytest.mark.parametrize("factor_bits", [8, 16])
def test_finer_factors_are_stored_and_lose_less(factor_bits: int) -> None:
    """Beside fine codes, whose own errors are small, factors of 4 bits are what is lost."""
    delta = _delta()
    coarse, finer = (
        quantize(torch.zeros_like(delta), delta, QuantizerSettings(4, rank=5, factor_bits=bits))
        for bits in (4, factor_bits)
    )
    difference = delta - dequantize(finer[0])
    assert finer[1].weight_error == pytest.approx(float(difference.square().sum() / delta.square().sum()), rel=1e-3)
    assert finer[1].weight_error < 0.5 * coarse[1].weight_error
    entry = expected_entry(QuantizerSettings(4, rank=5, factor_bits=factor_bits), tuple(delta.shape))
    assert (entry.version, entry.problem()) == (4, None)
    assert finer[0].factor_bits == entry.factor_bits == factor_bits
    assert entry.expected_nbytes(2) == finer[0].nbytes


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_directions_are_those_of_the_singular_value_decomposition(rank: int) -> None:
    delta = _delta()

    def sweep(work):
        return iter([work(delta[:25], slice(0, 25)), work(delta[25:], slice(25, 60))])

    found = leading_directions(sweep, (60, 96), rank, "cpu")
    left, values, right = torch.linalg.svd(delta)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    missed = float((delta - found.left @ found.right).norm() ** 2 - (delta - best).norm() ** 2)
    assert 0 < missed / float(best.norm() ** 2) < 0.04  # two factors at 4 bits: 1.15 % each, and directions of noise
    torch.testing.assert_close(found.energy, delta.double().square().sum(0))


def test_strong_directions_are_kept_to_a_percent_where_codes_alone_lose_a_tenth() -> None:
    """Along the strongest direction, what is stored is as long as the delta: nothing of it may shrink."""
    delta = _delta()
    delta[torch.rand(delta.shape, generator=torch.Generator().manual_seed(2)) < 0.45] = 0.0  # as a short bf16 fine-tune
    left, values, right = torch.linalg.svd(delta)

    def kept(rank: int) -> list[float]:
        quantized, _ = quantize(torch.zeros_like(delta), delta, QuantizerSettings(1, 0, rank=rank))
        along = left.T @ dequantize(quantized) @ right.T
        return [float(along[i, i] / values[i]) for i in range(3)]

    assert all(abs(length - 1) < 0.02 for length in kept(8))
    assert max(abs(length - 1) for length in kept(0)) > 0.1


@pytest.mark.parametrize("bits", [1, 2])
def test_salient_channels_stay_exact_and_the_rest_gets_better(bits: int) -> None:
    delta = _delta(loud=2)
    quantized, error = quantize(torch.zeros_like(delta), delta, QuantizerSettings(bits, 4, rank=4))
    index = quantized.salient_channels
    assert {7, 8} <= set(index.tolist())
    torch.testing.assert_close(dequantize(quantized)[:, index], delta[:, index], rtol=2e-3, atol=1e-5)
    without, plain = quantize(torch.zeros_like(delta), delta, QuantizerSettings(bits, 4))
    assert without.factors() is None
    assert error.weight_error < 0.75 * plain.weight_error


@pytest.mark.parametrize(("bits", "most"), [(4, 0.15), (8, 0.01), (16, 3e-4)])  # 0.107 for a Gaussian at 4
def test_rounding_keeps_the_length_along_each_vector(bits: int, most: float) -> None:
    vectors = torch.randn(5, 333, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5)[:, None]
    found = rounded(vectors, bits)
    torch.testing.assert_close((found.values * vectors).sum(1), vectors.square().sum(1), rtol=1e-4, atol=0)
    assert torch.equal(vectors_of(found.stored, found.steps, 333, bits), found.values)
    assert float((found.values - vectors).norm(dim=1).div(vectors.norm(dim=1)).max()) < most


def test_factors_give_the_part_that_is_added() -> None:
    delta = _delta()
    quantized, _ = quantize(torch.zeros_like(delta), delta, QuantizerSettings(2, 0, rank=4))
    left, right = quantized.factors()
    assert left.shape == (60, 4)
    assert right.shape == (4, 96)
    without = dequantize(replace(quantized, left_codes=None))
    torch.testing.assert_close(dequantize(quantized), without + left @ right)


@pytest.mark.parametrize("shape", [(1, 32), (5, 33), (7, 1), (64, 100), (2, 2)])
def test_rank_is_at_most_what_the_shape_allows(shape: tuple[int, int]) -> None:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    quantized, error = quantize(torch.zeros(shape), delta, QuantizerSettings(2, 0, rank=16))
    assert len(quantized.left_steps) == min(16, *shape)
    assert torch.isfinite(dequantize(quantized)).all()
    assert error.weight_error < 0.1


@pytest.mark.parametrize("rank", [1, 2])
def test_few_directions(rank: int) -> None:
    """A single vector is contiguous whatever its stride says."""
    delta = _delta(rows=64)
    quantized, _ = quantize(torch.zeros_like(delta), delta, QuantizerSettings(2, 0, rank=rank))
    assert quantized.left_codes.shape == (rank, 8)
    assert quantized.right_codes.shape == (rank, 12)


def test_a_delta_of_few_directions_is_all_there() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(40, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    quantized, error = quantize(torch.zeros_like(delta), delta, QuantizerSettings(1, 0, rank=8))
    assert torch.isfinite(dequantize(quantized)).all()
    assert error.weight_error < 0.02


def test_blocks_and_repetition_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, settings = _delta(), QuantizerSettings(1, 4, channel_scale="rms", rank=4)
    first, _ = quantize(torch.zeros_like(delta), delta, settings)
    second, _ = quantize(torch.zeros_like(delta), delta, settings)
    for name in ("left_codes", "left_steps", "right_codes", "right_steps"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for name in ("BLOCK_ELEMENTS", "FACTOR_BLOCK_ELEMENTS"):
        monkeypatch.setattr(f"meswitch_cli.delta.sweep.{name}", 96 * 7)
    blocked, _ = quantize(torch.zeros_like(delta), delta, settings)
    torch.testing.assert_close(dequantize(blocked), dequantize(first), rtol=0, atol=2e-4)


def test_equal_weights_have_no_delta_and_damaged_ones_are_refused() -> None:
    weight = _delta()
    assert quantize(weight, weight.clone(), QuantizerSettings(rank=4)) is None
    for bad in (float("nan"), float("inf")):
        damaged = weight.clone()
        damaged[3, 4] = bad
        with pytest.raises(FloatingPointError):
            quantize(weight, damaged, QuantizerSettings(rank=4))


@pytest.mark.parametrize("rank", [-1, 1025])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=str(rank)):
        QuantizerSettings(rank=rank)


@pytest.mark.parametrize("shape", [(256, 64), (2048, 128), (20000, 96)])  # one block of rows, and several
def test_bytes_are_the_same_with_one_thread_and_two(shape: tuple[int, int]) -> None:
    """Factors of 16 bits show the last digits: decompositions round otherwise with every number of threads."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) ** 8
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            result = quantize(torch.zeros_like(delta), delta, QuantizerSettings(0, 0, rank=8, factor_bits=16))
            assert result is not None
            found.append(result[0].tensors)
    finally:
        torch.set_num_threads(before)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
