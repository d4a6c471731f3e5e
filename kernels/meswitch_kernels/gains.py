"""Per-expert norm gains, held as ratios to the base's gain."""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import VALUE_DTYPES
from .groups import check_slots


class GainBank:
    """Ratios g_expert / g_base `[slots, hidden]` of one norm, multiplied in after the base's norm.

    Row 0 of `table` `[slots + 1, hidden]` is the base's (ones), so that slot s is row s + 1 and -1 needs no
    special case; an empty slot holds NaN.
    """

    def __init__(
        self, slots: int, hidden: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        if slots < 1 or hidden < 1:
            raise ValueError(f"slots and hidden must be at least 1, not {slots} and {hidden}")
        if dtype not in VALUE_DTYPES:
            raise TypeError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
        self.slots, self.hidden = slots, hidden
        self.table = torch.full((slots + 1, hidden), float("nan"), dtype=dtype, device=device)
        self.table[0] = 1
        self._loaded = [False] * slots

    @property
    def nbytes(self) -> int:
        """Bytes of device memory the bank holds."""
        return self.table.nbytes

    def load(self, slot: int, ratio: Tensor | None) -> None:
        """Put an expert's ratio `[hidden]` into `slot`; None stands for the base's own gain."""
        self._check_slot(slot)
        if ratio is not None and tuple(ratio.shape) != (self.hidden,):
            raise ValueError(f"ratio has shape {tuple(ratio.shape)}; this bank needs ({self.hidden},)")
        if ratio is None:
            self.table[slot + 1] = 1
        else:
            self.table[slot + 1].copy_(ratio, non_blocking=True)
        self._loaded[slot] = True

    def clear(self, slot: int) -> None:
        """Empty `slot`."""
        self._check_slot(slot)
        self.table[slot + 1] = float("nan")
        self._loaded[slot] = False

    def check_slots(self, slot_of_token: Tensor) -> None:
        """Raise IndexError for a slot outside [-1, slots), ValueError for an empty one; see `groups`."""
        check_slots(slot_of_token, self._loaded)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is not one of the bank's {self.slots}")
