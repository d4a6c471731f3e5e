"""Which expert each token of a forward pass belongs to: made once for a batch, read by every layer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Batch:
    """One forward pass of tokens of several experts.

    Attributes:
        slot_of_token: `[tokens]` int32, -1 for the base and for padding.
        groups: the same, by slot, as the kernels take it.
        gain_rows: `[tokens]` int64, slot + 1: rows of the tables of gains, whose first is the base's.
        slot_of_row: `[rows]` int32, of the rows that reach the head.
        held: an input, and what layers that have not been called yet make of it.
        residual: a layer, and what it shall add to its output.
    """

    __slots__ = (
        "_backend", "_slots", "_spread", "gain_rows", "groups", "held", "residual", "row_groups", "slot_of_row",
        "slot_of_token",
    )  # fmt: skip

    def __init__(
        self,
        slot_of_token: Tensor,
        slot_of_row: Tensor,
        slots: int,
        backend: ModuleType,
        runs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """`runs` are the slots and lengths of neighbouring tokens of one slot, where the batch is not under a graph."""
        self._slots, self._backend = slots, backend
        self.slot_of_token = slot_of_token
        self.gain_rows = slot_of_token.long() + 1
        self._spread: dict[tuple[int, int], Tensor] = {}
        self.held: tuple[Tensor, dict[Any, Tensor]] | None = None
        self.residual: tuple[Any, Tensor] | None = None
        self.slot_of_row = slot_of_row
        self.groups = backend.group_tokens(slot_of_token, slots, runs)
        same = slot_of_row is slot_of_token
        self.row_groups = self.groups if same else backend.group_tokens(slot_of_row, slots)

    def take_residual(self, layer: Any) -> Tensor | None:
        """What a layer shall add to its output; it is told once."""
        if self.residual is None or self.residual[0] is not layer:
            return None
        residual, self.residual = self.residual[1], None
        return residual

    def spread_gain_rows(self, before: int, after: int) -> Tensor:
        """`gain_rows` of every row of a tensor `[before, tokens, after, width]`, made once for all layers."""
        if before == after == 1:
            return self.gain_rows
        found = self._spread.get((before, after))
        if found is None:
            spread = self.gain_rows.view(1, -1, 1).expand(before, -1, after)
            found = spread.reshape(-1).contiguous()  # of a single token it would be one number, seen many times
            self._spread[before, after] = found
        return found

    def of_rows(self, rows: int) -> tuple[Tensor, Any]:
        """Slots and groups for a head that is given `rows` rows: all tokens, or those that predict.

        Raises:
            ValueError: as `of_tokens`.
        """
        if rows == self.slot_of_row.shape[0]:
            return self.slot_of_row, self.row_groups
        return self.of_tokens(rows)

    def of_tokens(self, rows: int) -> tuple[Tensor, Any]:
        """Slots and groups for a layer that is given `rows` rows, one a token; kernels would read past the last slot.

        Raises:
            ValueError: they are not the tokens of the batch.
        """
        if rows != self.slot_of_token.shape[0]:
            raise ValueError(f"a layer is given {rows} rows for {self.slot_of_token.shape[0]} tokens")
        return self.slot_of_token, self.groups

    def of_some(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Slots and groups for a layer that is given these tokens, by their places in the batch."""
        slots = self.slot_of_token[tokens]
        return slots, self._backend.group_tokens(slots, self._slots)


class OneSlotBatch(Batch):
    """A forward pass of tokens of one slot: its layers may be given any number of rows, whatever they are."""

    __slots__ = ("_device", "_found", "_slot")

    def __init__(self, slot: int, slots: int, backend: ModuleType, device: torch.device) -> None:
        self._slot, self._slots, self._backend, self._device = slot, slots, backend, device
        self._found: dict[int, tuple[Tensor, Any]] = {}
        self.held = self.residual = None

    def of_tokens(self, rows: int) -> tuple[Tensor, Any]:
        """Slots and groups for a layer that is given so many rows."""
        if rows not in self._found:
            slots = torch.full((rows,), self._slot, dtype=torch.int32, device=self._device)
            self._found[rows] = slots, self._backend.group_tokens(slots, self._slots, [(self._slot, rows)])
        return self._found[rows]

    def of_rows(self, rows: int) -> tuple[Tensor, Any]:
        return self.of_tokens(rows)

    def of_some(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self.of_tokens(tokens.shape[0])


class CurrentBatch(threading.local):
    """The batch that the calling thread is in; None means the base alone.

    It is the thread's own, so that another thread may run the base while experts generate.
    """

    batch: Batch | None = None
