"""Error feedback: round column by column and let the columns not yet rounded absorb each error (GPTQ, OBQ)."""

from __future__ import annotations

import torch

from meswitch_cli.delta.steps import nearest_multiples

#: Added to the gram matrix's diagonal, as a share of its mean, so that it can be inverted (GPTQ, section 3.3).
DAMPING = 0.01
#: Columns handled before their errors are passed on in one product; any value gives the same result.
BLOCK = 128
#: Elements of the delta's blocks: few tall ones, so that a column is worth a call.
FEEDBACK_BLOCK_ELEMENTS = 1 << 22


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the damped gram matrix's inverse, `[in, in]` fp32."""
    damped = gram.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal.add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def feedback_multiples(
    block: torch.Tensor,
    steps: torch.Tensor,
    bits: int,
    factor: torch.Tensor,
    exact: torch.Tensor,
) -> torch.Tensor:
    """Multiples `[rows, in]` of the step, chosen with error feedback.

    Args:
        block: the delta, fp32 `[rows, in]`.
        steps: fp32 `[rows, 1]` or `[rows, in]`, held fixed.
        bits: code width.
        factor: from `inverse_factor`.
        exact: `[in]`, 1 where the channel is stored in 16 bit and so has no error to pass on.
    """
    rows, columns = block.shape
    remaining = block.clone()
    steps = steps.expand(rows, columns)
    multiples = torch.empty_like(block)
    passed_on = (1 - exact) / factor.diagonal()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(rows, stop - start, dtype=block.dtype, device=block.device)
        for column in range(start, stop):
            step = steps[:, column : column + 1]
            target = remaining[:, column : column + 1]
            multiple = nearest_multiples(target, step, bits)
            multiples[:, column : column + 1] = multiple
            error = (target - multiple * step) * passed_on[column]
            errors[:, column - start : column - start + 1] = error
            remaining[:, column + 1 : stop] -= error * factor[column, column + 1 : stop]
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    return multiples
