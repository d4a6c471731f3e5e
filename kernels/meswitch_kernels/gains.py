"""The gains, or the shifts, that a norm has by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import VALUE_DTYPES


class GainBank:
    """Gains (or shifts) `[slots, hidden]` of one norm, each expert's own and the base's.

    Row 0 of `table` `[slots + 1, hidden]` is the base's, so that slot s is row s + 1 and -1 needs no special case.
    `rms_norm` multiplies by its rows. They are gains, not ratios to the base's: a ratio would be rounded twice, and
    there is none where the base's gain is 0. An empty slot holds NaN.
    """

    def __init__(self, slots: int, base: Tensor) -> None:
        """`base` `[hidden]` gives the bank its dtype and its device."""
        if slots < 1 or base.ndim != 1 or not len(base):
            raise ValueError(f"slots must be at least 1 and base [hidden], not {slots} and {list(base.shape)}")
        if base.dtype not in VALUE_DTYPES:
            raise TypeError(f"base must be bfloat16, float16 or float32, not {base.dtype}")
        self.slots, self.hidden = slots, len(base)
        self.table = torch.full((slots + 1, self.hidden), float("nan"), dtype=base.dtype, device=base.device)
        self.table[0] = base.detach()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the bank holds."""
        return self.table.nbytes

    def load(self, slot: int, value: Tensor | None) -> None:
        """Put an expert's gains `[hidden]` into `slot`; None stands for the base's own."""
        row = self._row(slot)
        if value is None:
            value = self.table[0]
        if tuple(value.shape) != (self.hidden,):
            raise ValueError(f"the gains have shape {tuple(value.shape)}; this bank needs ({self.hidden},)")
        row.copy_(value, non_blocking=True)

    def clear(self, slot: int) -> None:
        """Empty `slot`."""
        self._row(slot).fill_(float("nan"))

    def _row(self, slot: int) -> Tensor:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is not one of the bank's {self.slots}")
        return self.table[slot + 1]
