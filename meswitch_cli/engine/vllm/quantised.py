"""Linears whose weights vLLM keeps quantised: its own method computes the base's product, a bank adds the delta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.vllm.layers import Rows
from meswitch_cli.model.weights import CheckpointWeights

#: The most that a weight may differ, over the largest of its column. Codes agree exactly; products are rounded.
TOLERANCE = 0.05


class SharedZeros:
    """Weights of linears that compute a delta alone: those of one shape are one tensor."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], Tensor] = {}

    def of(self, shape: tuple[int, ...], module: Any) -> Tensor:
        """Zeros in the type that a linear computes in, on its device."""
        if shape not in self._made:
            device = next(module.parameters()).device
            self._made[shape] = torch.zeros(shape, dtype=module.params_dtype, device=device)
        return self._made[shape]


def is_quantised(module: Any) -> bool:
    """Whether a linear of vLLM keeps other numbers than its weights."""
    return not isinstance(module.quant_method, UnquantizedLinearMethod)


@torch.inference_mode()
def compare_quantised(module: Any, parts: Mapping[str, Rows], base: CheckpointWeights, count: int) -> None:
    """Compare `count` columns of a linear's weights, which are what it makes of single inputs, with the checkpoint's.

    Raises:
        EngineError: vLLM takes its numbers for other weights than `model.weights` does, or orders its rows otherwise.
    """
    zeros = next(iter(parts.values())).weight
    places = torch.linspace(0, zeros.shape[1] - 1, count).long()
    x = zeros.new_zeros(count, zeros.shape[1])
    x[torch.arange(count), places] = 1
    found = module.quant_method.apply(module, x, None).float().cpu()
    columns = found.split([rows.weight.shape[0] for rows in parts.values()], 1)
    for (name, rows), own in zip(parts.items(), columns, strict=True):
        meant = base.read(f"{name}.weight")[rows.shard.row_places][:, rows.shard.columns[0] + places].float().T
        if not torch.allclose(own, meant, rtol=0, atol=TOLERANCE * float(meant.abs().max())):
            raise EngineError(f"vLLM takes {name} for other weights than the checkpoint has; use --engine transformers")
