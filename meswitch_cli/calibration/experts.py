"""What reaches the single experts of a mixture, seen where their matrices are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

#: Products of an input and a matrix, by the place of the matrix among their arguments; the input comes before it.
_PRODUCTS = {"linear": 1, "matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 2}


class MatrixInputs(TorchFunctionMode):
    """Tells the inputs by which matrices are multiplied, of those that it was told to expect."""

    def __init__(self, report: Callable[[str, int, torch.Tensor], None]) -> None:
        """`report` hears the stack's name, the matrix's index in it and the inputs `[..., in]`."""
        super().__init__()
        self._report = report
        self._expected: dict[str, tuple[int, torch.Tensor]] = {}

    def expect(self, stack: str, index: int, matrix: torch.Tensor) -> None:
        """A matrix that was handed out, in the place of the stack's last."""
        self._expected[stack] = (index, matrix)

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        place = _PRODUCTS.get(getattr(function, "__name__", ""))
        if place is not None and len(arguments) > place:
            for stack, (index, matrix) in self._expected.items():
                if arguments[place] is matrix:
                    self._report(stack, index, arguments[place - 1])
                    break
        return function(*arguments, **(options or {}))
