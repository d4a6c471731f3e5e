import torch

from meswitch_cli.delta.feedback import BLOCK, feedback_multiples, inverse_factor
from meswitch_cli.delta.steps import nearest_multiples


def _problem(columns: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(8, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(1000, columns, generator=generator) @ mixing
    return block, inputs, inputs.T @ inputs


def test_feedback_lowers_the_output_error() -> None:
    block, inputs, gram = _problem()
    steps = torch.ones(8, 1)
    nothing_exact = torch.zeros(200)
    fed = feedback_multiples(block, steps, 2, inverse_factor(gram), nothing_exact)
    nearest = nearest_multiples(block, steps, 2)
    assert ((block - fed) @ inputs.T).square().sum() < 0.8 * ((block - nearest) @ inputs.T).square().sum()


def test_block_of_columns_gives_what_one_column_at_a_time_gives() -> None:
    block, _, gram = _problem(BLOCK + 20)
    steps = torch.full((8, 1), 0.9)
    factor = inverse_factor(gram)
    remaining = block.clone()
    expected = torch.empty_like(block)
    for column in range(block.shape[1]):  # GPTQ's algorithm 1 without its lazy batches
        multiple = nearest_multiples(remaining[:, column : column + 1], steps, 2)
        error = (remaining[:, column : column + 1] - multiple * steps) / factor[column, column]
        remaining[:, column + 1 :] -= error * factor[column, column + 1 :]
        expected[:, column : column + 1] = multiple
    multiples = feedback_multiples(block, steps, 2, factor, torch.zeros(block.shape[1]))
    assert (multiples != expected).float().mean() < 0.005  # a tie may fall the other way in another order of sums


def test_diagonal_gram_means_no_feedback() -> None:
    block, _, _ = _problem()
    factor = inverse_factor(torch.diag(torch.linspace(1, 2, 200)))
    multiples = feedback_multiples(block, torch.ones(8, 1), 2, factor, torch.zeros(200))
    assert torch.equal(multiples, nearest_multiples(block, torch.ones(8, 1), 2))


def test_exact_channels_pass_no_error_on() -> None:
    block, _, gram = _problem()
    factor = inverse_factor(gram)
    multiples = feedback_multiples(block, torch.ones(8, 1), 2, factor, torch.ones(200))
    assert torch.equal(multiples, nearest_multiples(block, torch.ones(8, 1), 2))


def test_dead_inputs_do_not_break_the_factor() -> None:
    factor = inverse_factor(torch.zeros(16, 16))
    assert torch.isfinite(factor).all()
