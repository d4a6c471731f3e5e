import pytest
import torch

from meswitch_cli.delta.codes import CODES
from meswitch_cli.delta.steps import codes_of, dots, initial_steps, multiples_of, nearest_multiples, step_ratio


@pytest.fixture
def block() -> torch.Tensor:
    return torch.randn(6, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("bits", "error"), [(1, 0.363), (2, 0.119), (4, 0.0115)])
def test_gaussian_step_gives_the_textbook_error(bits: int, error: float) -> None:
    values = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    steps = torch.full((1, 1), CODES[bits].gaussian_step)
    decoded = nearest_multiples(values, steps, bits) * steps
    assert float((values - decoded).square().mean()) == pytest.approx(error, rel=0.015)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_multiples_are_the_nearest_levels(block: torch.Tensor, bits: int) -> None:
    steps = initial_steps(dots(block, block, 0), bits, torch.full((1, 1), 256.0))
    multiples = nearest_multiples(block, steps, bits)
    levels = (torch.arange(1 << bits) - ((1 << bits) - 1) / 2) * steps[:, :, None]
    nearest = (block[:, :, None] - levels).abs().amin(-1)
    torch.testing.assert_close((block - multiples * steps).abs(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_and_multiples_are_one_to_one(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.uint8)[None]
    multiples = multiples_of(codes, bits)
    assert multiples[0].tolist() == [code - ((1 << bits) - 1) / 2 for code in range(1 << bits)]
    assert torch.equal(codes_of(multiples, bits), codes)


def test_zero_step_gives_a_code_that_exists() -> None:
    codes = codes_of(nearest_multiples(torch.zeros(2, 4), torch.zeros(2, 1), 2), 2)
    assert (codes <= 3).all()


@pytest.mark.parametrize("group_size", [0, 96])
def test_least_squares_step_has_no_better_neighbour(block: torch.Tensor, group_size: int) -> None:
    multiples = nearest_multiples(block, torch.ones(6, 1), 2)
    steps = step_ratio(dots(multiples, block, group_size), dots(multiples, multiples, group_size))
    assert steps.shape == (6, 1 if not group_size else 3)

    def error(factor: float) -> torch.Tensor:
        spread = steps if not group_size else steps.repeat_interleave(group_size, 1)[:, :256]
        return (block - factor * multiples * spread).square().sum(-1)

    assert (error(1.0) < error(1.01)).all()
    assert (error(1.0) < error(0.99)).all()


def test_least_squares_shrinks_where_the_unbiased_step_does_not(block: torch.Tensor) -> None:
    multiples = nearest_multiples(block, torch.ones(6, 1), 1)
    kept = multiples * step_ratio(dots(block, block, 0), dots(multiples, block, 0))
    torch.testing.assert_close((kept * block).sum(-1), block.square().sum(-1))
    shrunk = multiples * step_ratio(dots(multiples, block, 0), dots(multiples, multiples, 0))
    assert ((shrunk * block).sum(-1) / block.square().sum(-1) < 0.7).all()  # 2/pi for a Gaussian


def test_steps_of_nothing_are_zero() -> None:
    zero = torch.zeros(2, 1)
    assert step_ratio(torch.ones(2, 1), zero).tolist() == [[0.0], [0.0]]
    assert step_ratio(-torch.ones(2, 1), torch.ones(2, 1)).tolist() == [[0.0], [0.0]]
