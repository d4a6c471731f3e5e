# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator"
"""Root mean square norms, each row with the gains of its own slot, in one launch and one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .triton_device import on_its_device

_ELEMENTS = 1024
"""Elements that a program takes at least, in whole rows: norms of heads have rows of 64 to 256."""


@triton.jit(do_not_specialize=["rows"])
def norm_rows(
    x,
    table,
    y,
    gain_rows,
    rows,
    gain_count,
    hidden,
    x_stride,
    epsilon,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y `[rows, hidden]` = each row of x over its root mean square, times its own row of `table`, or the first."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    given = (row < rows)[:, None] & (k < hidden)[None, :]
    value = tl.load(x + (row * x_stride)[:, None] + k[None, :], mask=given, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / hidden + epsilon)
    normed = value * scale[:, None]
    if table.dtype.element_ty == y.dtype.element_ty:  # see `naive.rms_norm`
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    if OWN:
        index = tl.load(gain_rows + row, mask=row < rows, other=0)
        known = (index >= 0) & (index < gain_count)
        gains = table + (tl.where(known, index, 0) * hidden)[:, None] + k[None, :]
        result = normed * tl.load(gains, mask=given, other=0.0).to(tl.float32)
        result = tl.where(known[:, None], result, float("nan"))
    else:
        result = normed * tl.load(table + k, mask=k < hidden, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (row * hidden)[:, None] + k[None, :], result.to(y.dtype.element_ty), mask=given)


def norm_launch(hidden: int) -> dict[str, int]:
    """Rows and columns of a program for rows of `hidden`, and its warps: 16 elements a thread up to 8,192."""
    block = triton.next_power_of_2(hidden)
    rows = max(1, _ELEMENTS // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512))}


@on_its_device
def rms_norm(x: Tensor, epsilon: float, table: Tensor, gain_rows: Tensor | None) -> Tensor:
    """As `naive.rms_norm`; a row whose gains are outside the table comes out as NaN.

    Without `gain_rows` all rows have the gains of the table's first row.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    rows, hidden = x.shape
    launch = norm_launch(hidden)
    norm_rows[(triton.cdiv(rows, launch["ROWS"]),)](
        x,
        table,
        y,
        table if gain_rows is None else gain_rows.contiguous(),
        rows,
        table.shape[0],
        hidden,
        x.stride(0),
        epsilon,
        OWN=gain_rows is not None,
        **launch,
    )
    return y


def base_norm(x: Tensor, epsilon: float, gain: Tensor) -> Tensor:
    """x `[rows, hidden]` over its root mean square, times `gain` `[hidden]`: `rms_norm` for a batch of one gain."""
    return rms_norm(x, epsilon, gain.unsqueeze(0), None)
