"""Which slot each token of vLLM's next forward pass has, in memory that stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from meswitch_cli.engine.batch import Batch

Run = tuple[int, int]


class AnnouncedTokens:
    """What vLLM says of a forward pass before it: written to the same tensors each time, so that a captured graph and a
    traced one read them where they read them first.

    Attributes:
        slot_of_token: `[most tokens]` int32, -1 for the base and for what is beyond the tokens announced.
        slot_of_row: `[most rows]` int32, of the rows that reach the head.
        gain_rows: `[most tokens]` int64, slot + 1: rows of the tables of gains.
        active: whether an expert is among them.
    """

    def __init__(self, slots: int, most_tokens: int, most_rows: int, device: torch.device, backend: ModuleType) -> None:
        self._slots, self._backend, self._device = slots, backend, device
        self.slot_of_token = torch.full((most_tokens,), -1, dtype=torch.int32, device=device)
        self.slot_of_row = torch.full((most_rows,), -1, dtype=torch.int32, device=device)
        self.gain_rows = torch.zeros(most_tokens, dtype=torch.long, device=device)
        self.active = False
        self._tokens = self._rows = 0
        self._runs: tuple[Run, ...] = ()
        self._batches: dict[tuple[int, bool], Batch] = {}
        self._batch_of_rows: Batch | None = None
        #: Made while a graph was captured, which reads their memory whenever it is replayed.
        self._captured: list[Batch] = []

    def announce(self, of_token: Sequence[int], of_row: Sequence[int]) -> None:
        """Take the slots of the tokens, and of the rows of logits, of the pass to come.

        Raises:
            RuntimeError: they are more than there is memory for.
        """
        tokens, rows = np.asarray(of_token, dtype=np.int32), np.asarray(of_row, dtype=np.int32)
        if len(tokens) > len(self.slot_of_token) or len(rows) > len(self.slot_of_row):
            raise RuntimeError(
                f"vLLM announces {len(tokens)} tokens and {len(rows)} rows of logits; there is memory for "
                f"{len(self.slot_of_token)} and {len(self.slot_of_row)}"
            )
        self.active = bool((tokens >= 0).any())
        self._tokens, self._rows = len(tokens), len(rows)
        self._runs, self._batches, self._batch_of_rows = _runs(tokens), {}, None
        for target, values in ((self.slot_of_token, tokens), (self.slot_of_row, rows)):
            target[: len(values)].copy_(self._on_host(values), non_blocking=True)
            target[len(values) :].fill_(-1)
        torch.add(self.slot_of_token, 1, out=self.gain_rows)

    def batch(self, tokens: int) -> Batch | None:
        """What layers of a pass of `tokens` tokens go by; None where all are the base's.

        Those beyond the announced ones are padding.

        Raises:
            RuntimeError: fewer tokens than were announced.
        """
        if not self.active:
            return None
        if tokens < self._tokens:
            raise RuntimeError(f"vLLM computes {tokens} tokens, {self._tokens} were announced")
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        found = self._batches.get((tokens, capturing))
        if found is None:
            found = self._batches[tokens, capturing] = self._batch(tokens, capturing)
        return found

    def rows(self, hidden: Tensor) -> Batch | None:
        """As `batch`, of what reaches the head: a copy of the rows that predict, one a request, or some tokens of the
        pass where they lie, as for the log-probabilities of a prompt.

        Raises:
            RuntimeError: they are neither.
        """
        if not self.active:
            return None
        rows = hidden.shape[0]
        if hidden.untyped_storage().nbytes() > hidden.nbytes:
            first = hidden.storage_offset() // hidden.stride(0)
            slots = self.slot_of_token[first : first + rows]
            return Batch(slots, slots, self._slots, self._backend)
        if rows != self._rows:
            raise RuntimeError(f"vLLM asks for logits of {rows} tokens, {self._rows} were announced")
        if self._batch_of_rows is None:
            slots = self.slot_of_row[:rows]
            self._batch_of_rows = Batch(slots, slots, self._slots, self._backend)
        return self._batch_of_rows

    def _batch(self, tokens: int, capturing: bool) -> Batch:
        """A captured graph is replayed with other slots, so it must not be planned by those of now."""
        slots = self.slot_of_token[:tokens]
        padding = tokens - self._tokens
        runs = None if capturing else (*self._runs, *([(-1, padding)] if padding else []))
        made = Batch(slots, slots, self._slots, self._backend, runs)
        if capturing:
            self._captured.append(made)
        return made

    def _on_host(self, values: np.ndarray) -> Tensor:
        held = torch.from_numpy(values)
        return held.pin_memory() if self._device.type == "cuda" else held


def _runs(slots: np.ndarray) -> tuple[Run, ...]:
    """Slots and lengths of neighbours of one slot."""
    if not len(slots):
        return ()
    starts = np.flatnonzero(np.diff(slots, prepend=slots[0] - 1))
    lengths = np.diff(starts, append=len(slots))
    return tuple(zip(slots[starts].tolist(), lengths.tolist(), strict=True))
