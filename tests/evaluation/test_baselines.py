"""Every method against its paper's formula, written out anew here, and its bytes counted by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import UsageError
from meswitch_cli.evaluation.baselines import BASELINES, parse_method
from meswitch_cli.evaluation.baselines.bitdelta import bitdelta
from meswitch_cli.evaluation.baselines.calibrated import Feedback
from meswitch_cli.evaluation.baselines.d_qrelo import DQRelo, one_bit
from meswitch_cli.evaluation.baselines.dare import Dare
from meswitch_cli.evaluation.baselines.delta_come import DeltaCome, come_ranks
from meswitch_cli.evaluation.baselines.low_rank import LowRankMethod, rank_at
from meswitch_cli.evaluation.baselines.meswitch import salient_delta, with_channels
from meswitch_cli.evaluation.baselines.per_axis import PerAxis
from meswitch_cli.evaluation.baselines.rtn import RoundToNearest, asymmetric_grid, round_to_nearest
from meswitch_cli.evaluation.baselines.sparse import Sparse

OUT, IN = 24, 40


@pytest.fixture
def delta() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = 0.01 * torch.randn(OUT, IN, generator=generator)
    values[:, 5] *= 8
    return values


@pytest.fixture
def statistics() -> InputStatistics:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, IN, generator=generator) * torch.linspace(0.1, 3, IN)
    return InputStatistics(inputs.square().sum(0), inputs.T @ inputs, 200)


def test_bitdelta(delta: torch.Tensor) -> None:
    one, two = bitdelta(delta), bitdelta(delta, masks=2)
    mean = float(delta.abs().mean())
    assert torch.equal(one.delta, torch.where(delta > 0, mean, -mean))
    rest = delta - one.delta
    second = float(rest.abs().mean())
    torch.testing.assert_close(two.delta, one.delta + torch.where(rest > 0, second, -second))
    assert one.nbytes == OUT * 5 + 2 and two.nbytes == 2 * (OUT * 5 + 2)
    # Equation 4: the mean magnitude is the least-squares scale of the signs.
    best = min(np.linspace(0.5, 1.5, 101), key=lambda f: float((delta - f * one.delta).square().sum()))
    assert best == pytest.approx(1.0)


def test_per_axis(delta: torch.Tensor) -> None:
    for axis, dim, scales in (("row", 1, OUT), ("column", 0, IN)):
        found = PerAxis(axis=axis).approximate(delta)
        expected = torch.where(delta > 0, 1.0, -1.0) * delta.abs().mean(dim, keepdim=True).half().float()
        assert torch.equal(found.delta, expected) and found.nbytes == OUT * 5 + 2 * scales
    best, column = PerAxis().approximate(delta), PerAxis(axis="column").approximate(delta)
    assert torch.equal(best.delta, column.delta)  # one heavy column: its own scale pays
    turned = delta.T.contiguous()
    assert torch.equal(PerAxis().approximate(turned).delta, PerAxis(axis="row").approximate(turned).delta)


@pytest.mark.parametrize(("bits", "group"), [(1, 0), (2, 0), (2, 16), (4, 0), (4, 32), (8, 0)])
def test_round_to_nearest(delta: torch.Tensor, bits: int, group: int) -> None:
    found = round_to_nearest(delta, bits, group)
    size = group or IN
    for row in range(OUT):
        for start in range(0, IN, size):
            part = delta[row, start : start + size]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = (high - low) / (2**bits - 1)
            zero = round(-low / scale)
            codes = (torch.round(part / scale) + zero).clamp(0, 2**bits - 1)
            expected = (codes - zero) * float(torch.tensor(scale).half())
            torch.testing.assert_close(found.delta[row, start : start + size], expected, rtol=2e-3, atol=1e-6)
    groups = OUT * math.ceil(IN / size)
    assert found.nbytes == OUT * math.ceil(IN * bits / 8) + 2 * groups + math.ceil(groups * bits / 8)


def test_low_rank_is_the_best_of_its_rank(delta: torch.Tensor) -> None:
    values = torch.linalg.svdvals(delta)
    for rank in (1, 5, 20):
        found = LowRankMethod(rank=rank).approximate(delta)
        assert torch.linalg.matrix_rank(found.delta, atol=1e-5) == rank
        left = float((delta - found.delta).square().sum())
        assert left == pytest.approx(float(values[rank:].square().sum()), rel=1e-2, abs=1e-7)
        assert found.nbytes == 2 * rank * (OUT + IN)
    shape = torch.Size((576, 1536))
    rank = rank_at(shape, 2)
    assert 2 * rank * sum(shape) <= 2 * 576 * 1536 / 8 < 2 * (rank + 1) * sum(shape)


def test_delta_come_gives_its_published_ranks_and_most_bits_to_the_largest() -> None:
    """At 4096 x 4096 and 1/16 of the size the authors run 2, 32 and 968 vectors at 8, 3 and 2 bits."""
    assert come_ranks(torch.Size((4096, 4096)), 1) == {8: 2, 3: 32, 2: 968}
    # The authors give 11008 x 4096 matrices 1,428 vectors at 2 bits, eight fewer than the budget allows.
    assert come_ranks(torch.Size((11008, 4096)), 1) == {8: 2, 3: 32, 2: 1436}
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(128, 256, generator=generator)
    matrix = matrix @ torch.diag(torch.linspace(2, 0.1, 256))
    found = DeltaCome(bits=3.0).approximate(matrix)
    codes = 3 * 128 * 256 / (128 + 256)
    ranks = {8: 2, 3: 32, 2: int((codes - 2 * 8 - 32 * 3) / 2)}
    expected = sum(
        math.ceil(size * bits / 8) * count
        + math.ceil(size / 128) * count * 2
        + math.ceil(math.ceil(size / 128) * count * bits / 8)
        for bits, count in ranks.items()
        for size in (128, 256)
    )
    assert found.nbytes == expected
    error = float((matrix - found.delta).square().sum() / matrix.square().sum())
    truncated = LowRankMethod(bits=3.0).approximate(matrix).delta
    assert error < float((matrix - truncated).square().sum() / matrix.square().sum())
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    product, index = torch.zeros_like(matrix), 0
    for bits, count in ranks.items():
        for _ in range(min(count, len(values) - index)):
            column, row = values[index].sqrt() * left[:, index], values[index].sqrt() * right[index]
            pair = [round_to_nearest(vector[None], bits, 128).delta[0] for vector in (column, row)]
            product += torch.outer(*pair)
            index += 1
    torch.testing.assert_close(found.delta, product, rtol=1e-4, atol=1e-5)
    # The first vectors are nearly exact: the component along each is kept within a per cent.
    assert float(left[:, 0] @ found.delta @ right[0]) == pytest.approx(float(values[0]), rel=0.01)


def test_d_qrelo_in_either_order() -> None:
    """Signs times the mean magnitude and the best rank of the rest, by hand: [[3, -1], [1, 1]] has mean magnitude 1.5,
    which leaves [[1.5, 0.5], [-0.5, -0.5]]."""
    matrix = torch.tensor([[3.0, -1.0], [1.0, 1.0]])
    rest = torch.tensor([[1.5, 0.5], [-0.5, -0.5]])
    left, values, right = np.linalg.svd(rest.numpy())
    expected = matrix - rest + torch.tensor(values[0] * np.outer(left[:, 0], right[0]))
    found = DQRelo(rank=1).approximate(matrix)
    torch.testing.assert_close(found.delta, expected, rtol=1e-3, atol=1e-3)
    assert found.nbytes == 2 * 1 + 2 + 2 * (2 + 2)
    left, values, right = np.linalg.svd(matrix.numpy())
    directions = torch.tensor(values[0] * np.outer(left[:, 0], right[0]))
    rest = matrix - directions
    expected = directions + torch.where(rest > 0, 1.0, -1.0) * rest.abs().mean()
    found = DQRelo(rank=1, order="svd-first").approximate(matrix)
    torch.testing.assert_close(found.delta, expected, rtol=1e-3, atol=1e-3)
    assert DQRelo(rank=2).approximate(matrix).delta == pytest.approx(matrix, abs=2e-3)


def test_d_qrelo_takes_an_eighth_of_the_size(delta: torch.Tensor) -> None:
    wide = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    found = DQRelo().approximate(wide)
    vector = 2 * (256 + 512)
    assert 2 * wide.numel() / 8 - vector < found.nbytes <= 2 * wide.numel() / 8 + 2
    assert torch.equal(one_bit(delta, None), bitdelta(delta).delta)


def test_dare_keeps_what_it_says(delta: torch.Tensor) -> None:
    found = Dare(choice="magnitude", rescale="none").approximate(delta)
    kept, count = found.delta != 0, OUT * IN // 10
    assert int(kept.sum()) == count and float(delta[kept].abs().min()) >= float(delta[~kept].abs().max())
    assert torch.equal(found.delta[kept], delta[kept].half().float()) and found.nbytes == 2 * count + OUT * 5
    scaled = Dare(choice="magnitude").approximate(delta).delta
    torch.testing.assert_close(scaled, 10 * torch.where(kept, delta, 0.0), rtol=1e-3, atol=0)
    fair = Dare(choice="magnitude", rescale="projection").approximate(delta).delta
    assert float((fair * delta).sum()) == pytest.approx(float(delta.square().sum()), rel=1e-3)
    drawn = Dare().approximate(delta, name="a")
    kept = drawn.delta != 0
    torch.testing.assert_close(drawn.delta[kept], 10 * delta[kept], rtol=1e-3, atol=1e-6)
    assert drawn.nbytes == 2 * int(kept.sum()) and 50 < int(kept.sum()) < 150
    assert torch.equal(Dare().approximate(delta, name="a").delta, drawn.delta)
    assert not torch.equal(Dare().approximate(delta, name="b").delta, drawn.delta)
    assert not torch.equal(Dare(seed=1).approximate(delta, name="a").delta, drawn.delta)
    torch.testing.assert_close(Dare(drop=0.0).approximate(delta).delta, delta, rtol=1e-3, atol=1e-6)


def output_error(found: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor) -> float:
    missed = (found - wanted).double()
    return float(((missed @ gram.double()) * missed).sum())


def test_error_feedback_by_hand() -> None:
    """Two columns with inputs x1 = x2: the second absorbs the first's error where levels allow. 0.6 and 0.6 round to 1
    and 1 alone; together they are 1.2, which 1 and 0 come closer to."""
    values = torch.tensor([[0.6, 0.6]])
    grid = asymmetric_grid(torch.tensor([[0.0, 1.0]]), 1)
    assert grid.nearest(values).tolist() == [[1, 1]]
    gram = torch.tensor([[1.001, 1.0], [1.0, 1.0]])
    assert grid.with_feedback(values, Feedback.of(gram)).tolist() == [[1, 0]]
    # Inputs of no relation pass nothing on.
    assert grid.with_feedback(values, Feedback.of(torch.eye(2))).tolist() == [[1, 1]]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_error_feedback_lowers_the_outputs_error_on_the_same_levels(
    delta: torch.Tensor, statistics: InputStatistics, bits: int
) -> None:
    gram = statistics.gram
    assert gram is not None
    mixed = gram + 50 * torch.ones(IN, IN)  # inputs with a common part
    grid = asymmetric_grid(delta, bits, 16)
    fed = grid.with_feedback(delta, Feedback.of(mixed))
    assert output_error(fed, delta, mixed) < output_error(grid.nearest(delta), delta, mixed)
    levels = (fed / grid.stored + grid.zero).round()
    torch.testing.assert_close((levels - grid.zero) * grid.stored, fed)
    assert int(levels.min()) >= 0 and int(levels.max()) <= 2**bits - 1


@pytest.mark.parametrize("spec", ["delta-come:bits=2", "d-qrelo:rank=2", "d-qrelo:rank=2,order=svd-first"])
def test_calibrated_rounding_takes_the_same_bytes_and_is_closer(spec: str) -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(48, 64, generator=generator) @ torch.diag(torch.linspace(2, 0.2, 64))
    inputs = torch.randn(300, 64, generator=generator) + 2 * torch.randn(300, 1, generator=generator)
    gram = inputs.T @ inputs
    known = InputStatistics(inputs.square().sum(0), gram, 300)
    plain, calibrated = parse_method(spec), parse_method(f"{spec},rounding=gptq")
    assert calibrated.needs_calibration and not plain.needs_calibration
    near, fed = plain.approximate(matrix, known), calibrated.approximate(matrix, known)
    assert fed.nbytes == near.nbytes
    assert output_error(fed.delta, matrix, gram) < 0.9 * output_error(near.delta, matrix, gram)
    # Without inputs of its own, a linear is rounded to nearest.
    assert torch.equal(calibrated.approximate(matrix, None).delta, near.delta)


def test_sparse_quantised_keeps_the_two_largest_of_four(delta: torch.Tensor) -> None:
    found = Sparse(bits=4, group=16).approximate(delta)
    kept = found.delta.view(OUT, -1, 4) != 0
    assert int(kept.sum(-1).max()) <= 2
    for quad, chosen in zip(delta.view(-1, 4), kept.view(-1, 4), strict=True):
        largest = set(quad.abs().topk(2).indices.tolist())
        assert set(chosen.nonzero()[:, 0].tolist()) <= largest
    survivors = OUT * IN // 2
    assert found.nbytes == survivors * 4 // 8 + survivors * 2 // 8 + 2 * OUT * 3
    rows, whole = Sparse(bits=4, group=0).approximate(delta), Sparse(bits=4, group=IN).approximate(delta)
    assert torch.equal(rows.delta, whole.delta) and rows.nbytes == whole.nbytes
    with pytest.raises(ValueError, match="multiple of 4"):
        Sparse().approximate(delta[:, :7].contiguous())


@pytest.mark.parametrize("bits", [2, 4])
def test_sparse_quantised_rounds_the_survivors_of_each_group(delta: torch.Tensor, bits: int) -> None:
    """Levels −2^(b−1) … 2^(b−1)−1 times the group's largest magnitude over 2^(b−1)."""
    found, half = Sparse(bits=bits, group=16).approximate(delta), 2 ** (bits - 1)
    for row in range(OUT):
        survivors = torch.zeros(IN)
        for start in range(0, IN, 4):
            places = sorted(range(start, start + 4), key=lambda place: -abs(float(delta[row, place])))[:2]
            survivors[places] = delta[row, places]
        for start in range(0, IN, 16):
            part = survivors[start : start + 16]
            scale = float(part.abs().max()) / half
            codes = torch.round(part / scale).clamp(-half, half - 1)
            expected = codes * float(torch.tensor(scale).half())
            torch.testing.assert_close(found.delta[row, start : start + 16], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("steps", ["least-squares", "unbiased", "output-unbiased", "layerwise"])
def test_chosen_channels_equal_the_artifact_s_where_the_choice_is_the_same(
    delta: torch.Tensor, statistics: InputStatistics, bits: int, steps: str
) -> None:
    settings = QuantizerSettings(bits, 3, steps=steps)  # type: ignore[arg-type]
    result = quantize(torch.zeros_like(delta), delta, settings, statistics)
    assert result is not None
    found = with_channels(delta, settings, result[0].salient_channels, statistics)
    torch.testing.assert_close(found.delta, dequantize(result[0]), rtol=1e-3, atol=1e-5)  # 16 bit
    assert found.nbytes == result[0].nbytes


def test_saliency_scores_choose_what_they_say(delta: torch.Tensor, statistics: InputStatistics) -> None:
    settings = QuantizerSettings(2, 2)

    def exact(saliency: str, seed: int = 0) -> set[int]:
        generator = torch.Generator().manual_seed(seed)
        found = salient_delta(delta, settings, saliency, statistics, generator)  # type: ignore[arg-type]
        error = (found.delta - delta).abs().amax(0) / delta.abs().amax(0)  # kept channels are exact to 16 bit
        return set((error < 1e-3).nonzero()[:, 0].tolist())

    assert exact("magnitude") == set(delta.square().sum(0).topk(2).indices.tolist()) and 5 in exact("magnitude")
    assert exact("activation") == set(statistics.energy.topk(2).indices.tolist())
    assert exact("random") == exact("random") and len(exact("random")) == 2
    assert any(exact("random", seed) != exact("random") for seed in range(1, 4))
    sizes = {
        saliency: salient_delta(delta, settings, saliency, statistics, torch.Generator()).nbytes  # type: ignore[arg-type]
        for saliency in ("error", "magnitude", "activation", "random")
    }
    assert len(set(sizes.values())) == 1


def test_the_page_has_every_method_with_its_options() -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands" / "eval.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and "--" not in line}
    assert set(BASELINES) <= set(rows)
    for name in BASELINES:
        for option, value in parse_method(name).options.items():
            where = page if option in ("embedding", "seed") else rows[name]
            assert f"`{option}={value}`" in where


def test_specs_are_read_and_refused() -> None:
    method = parse_method("rtn:bits=4,group=128,embedding=16")
    assert method == RoundToNearest(bits=4, group=128, embedding=16)
    assert method.options == {"bits": 4, "group": 128, "embedding": 16, "seed": 0}
    assert parse_method("low-rank:bits=1.5").options["bits"] == 1.5
    for name in BASELINES:
        assert parse_method(name).approximate(torch.randn(8, 128)).delta.shape == (8, 128)
    for spec, message in (
        ("gptq", "there are bitdelta"),
        ("rtn:depth=4", "'depth=4' is none of its options"),
        ("rtn:bits", "'bits' is none of its options"),
        ("rtn:bits=two", "cannot be 'two'"),
        ("rtn:bits=0", "between 0 and 8"),
        ("bitdelta:masks=9", "masks must be one of"),
        ("per-axis:axis=both", "axis must be one of"),
        ("meswitch:bits=3", "bits must be 0.125, 0.25, 0.5, 1, 2 or 4"),
        ("low-rank:bits=nan", "cannot be"),
        ("dare:drop=1.0", "drop must be below 1"),
        ("d-qrelo:order=random", "order must be one of signs-first, svd-first"),
        ("rtn:embedding=3", "embedding must be one of 1, 2, 4, 16"),
        ("meswitch:saliency=activation,activations=none", "needs activations"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_method(spec)
