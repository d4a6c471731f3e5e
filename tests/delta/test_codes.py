import pytest
import torch

from meswitch_cli.delta.codes import (
    GAUSSIAN_STEP,
    centred,
    initial_steps,
    layerwise_steps,
    least_squares_steps,
    round_to_codes,
    unbiased_steps,
)

ONES = torch.ones(256)


@pytest.fixture
def block() -> torch.Tensor:
    return torch.randn(6, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("bits", "error"), [(1, 0.363), (2, 0.119), (4, 0.0115)])
def test_gaussian_step_gives_the_textbook_error(bits: int, error: float) -> None:
    values = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0))
    steps = torch.full((1, 1), GAUSSIAN_STEP[bits])
    decoded = centred(round_to_codes(values, steps, bits), bits) * steps
    assert float((values - decoded).square().mean()) == pytest.approx(error, rel=0.015)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_the_nearest_levels(block: torch.Tensor, bits: int) -> None:
    steps = initial_steps(block, bits, 0, ONES)
    codes = round_to_codes(block, steps, bits)
    levels = (torch.arange(1 << bits) - ((1 << bits) - 1) / 2) * steps[:, :, None]
    nearest = (block[:, :, None] - levels).abs().amin(-1)
    chosen = (block - centred(codes, bits) * steps).abs()
    torch.testing.assert_close(chosen, nearest, rtol=1e-5, atol=1e-6)


def test_zero_step_decodes_to_zero() -> None:
    codes = round_to_codes(torch.zeros(2, 4), torch.zeros(2, 1), 2)
    assert ((codes >= 0) & (codes <= 3)).all()


@pytest.mark.parametrize("group_size", [0, 96])
def test_least_squares_step_has_no_better_neighbour(block: torch.Tensor, group_size: int) -> None:
    multiples = centred(round_to_codes(block, torch.ones(6, 1), 2), 2)
    steps = least_squares_steps(block, multiples, group_size)
    assert steps.shape == (6, 1 if not group_size else 3)

    def error(factor: float) -> torch.Tensor:
        spread = steps if not group_size else steps.repeat_interleave(group_size, 1)[:, :256]
        return (block - factor * multiples * spread).square().sum(-1)

    assert (error(1.0) < error(1.01)).all()
    assert (error(1.0) < error(0.99)).all()


def test_unbiased_step_keeps_the_projection(block: torch.Tensor) -> None:
    multiples = centred(round_to_codes(block, torch.ones(6, 1), 1), 1)
    decoded = multiples * unbiased_steps(block, multiples, 0)
    torch.testing.assert_close((decoded * block).sum(-1), block.square().sum(-1))
    shrunk = multiples * least_squares_steps(block, multiples, 0)
    assert ((shrunk * block).sum(-1) / block.square().sum(-1) < 0.7).all()  # 2/pi for a Gaussian


def test_layerwise_step_minimises_the_output_error(block: torch.Tensor) -> None:
    inputs = torch.randn(500, 256, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 256)
    multiples = centred(round_to_codes(block, torch.ones(6, 1), 2), 2)
    steps = layerwise_steps(block, multiples, inputs.T @ inputs)

    def error(factor: float) -> torch.Tensor:
        return ((block - factor * steps * multiples) @ inputs.T).square().sum(-1)

    assert (error(1.0) < error(1.01)).all()
    assert (error(1.0) < error(0.99)).all()
