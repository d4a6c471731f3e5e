"""What calibration tells the quantiser about one tensor: its inputs, and what an error in it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a linear layer's inputs over the calibration tokens.

    Attributes:
        energy: `[in]` fp32, the sum over tokens of x_i squared.
        gram: `[in, in]` fp32, the sum over tokens of x x^T, where a setting needs it.
        tokens: how many tokens were seen.
        inputs: `[tokens, in]` fp32, the inputs themselves, where there are so few that they say it shorter.
    """

    energy: torch.Tensor
    gram: torch.Tensor | None
    tokens: int
    inputs: torch.Tensor | None = None


class Sensitivity(Protocol):
    """How much errors of a tensor's weights `[out, in]` cost.

    With F the Fisher information of the model's predictions, summed over tokens, errors e of the weights make a
    divergence of e^T F e / 2. Errors of rounding are as good as independent, so F's diagonal is enough.
    """

    @property
    def input_energy(self) -> torch.Tensor | None:
        """`[in]`, the sum over tokens of x_i squared; None where rows are looked up, not multiplied."""

    def of_rows(self, rows: slice) -> torch.Tensor:
        """What a squared error of each weight costs, fp32 `[rows, in]`: nats of KL a token."""

    def row_weights(self) -> torch.Tensor:
        """`[out]`, in proportion to what a row's errors cost."""


@dataclass(frozen=True)
class LinearSensitivity:
    """A linear's, or a head's. Implements `Sensitivity`.

    Attributes:
        inputs: `[windows, tokens, in]` fp32.
        gradients: `[windows, tokens, out]` fp32, of a random projection of the predictions whose expected square is
            the Fisher information, with respect to the outputs.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor

    @property
    def input_energy(self) -> torch.Tensor:
        return self.inputs.square().sum((0, 1))

    def gradient(self, rows: slice) -> torch.Tensor:
        """With respect to the weights, `[windows, rows, in]`."""
        return self.gradients[:, :, rows].transpose(1, 2) @ self.inputs

    def of_rows(self, rows: slice) -> torch.Tensor:
        return _cost(self.gradient(rows), self.inputs)

    def row_weights(self) -> torch.Tensor:
        return self.gradients.square().sum((0, 1))


@dataclass(frozen=True)
class EmbeddingSensitivity:
    """An embedding's. Implements `Sensitivity`.

    Attributes:
        ids: `[windows, tokens]` int64.
        gradients: `[windows, tokens, in]` fp32, with respect to the rows that were looked up.
        head: of the head that is tied to it, if one is.
    """

    ids: torch.Tensor
    gradients: torch.Tensor
    rows: int
    head: LinearSensitivity | None = None

    @property
    def input_energy(self) -> None:
        return None

    def of_rows(self, rows: slice) -> torch.Tensor:
        start, end, _ = rows.indices(self.rows)
        windows, width = self.ids.shape[0], self.gradients.shape[2]
        if self.head is None:
            found = torch.zeros(windows, end - start, width, device=self.gradients.device)
        else:
            found = self.head.gradient(slice(start, end))
        window, token = torch.nonzero((self.ids >= start) & (self.ids < end), as_tuple=True)
        place = (window, self.ids[window, token] - start)
        return _cost(found.index_put(place, self.gradients[window, token], accumulate=True), self.gradients)

    def row_weights(self) -> torch.Tensor:
        looked_up = torch.zeros(self.rows, device=self.gradients.device)
        looked_up.index_add_(0, self.ids.flatten(), self.gradients.square().sum(2).flatten())
        return looked_up if self.head is None else looked_up + self.head.row_weights()


def _cost(gradient: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Half the mean square of gradients `[windows, rows, in]` over as many tokens as `[windows, tokens, ...]` has."""
    return gradient.square().sum(0) / (2 * tokens.shape[0] * tokens.shape[1])
