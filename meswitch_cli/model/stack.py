"""The experts' matrices of a layer, made one at a time as the layer asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class MatrixStack:
    """Stands in the place of a 3-D parameter `[experts, ...]` of which a module takes single matrices.

    Anything else that is asked of it is asked of the whole, which is then made.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        matrix: Callable[[int], torch.Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device
        self._matrix = matrix

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, int) or (isinstance(index, torch.Tensor) and index.dim() == 0):
            return self._matrix(int(index))
        return self.whole()[index]

    def whole(self) -> torch.Tensor:
        """`[experts, ...]`."""
        made = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for index in range(len(made)):
            made[index] = self._matrix(index)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, MatrixStack):
                return value.whole()
            return type(value)(plain(item) for item in value) if isinstance(value, list | tuple) else value

        return function(*plain(arguments), **{key: plain(value) for key, value in (options or {}).items()})
