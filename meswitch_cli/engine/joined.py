"""What layers of a decoder compute in one launch where the kernels can do that: siblings, and what is between linears.

Siblings are linears of the same input, as an attention's q, k and v.
"""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from meswitch_cli.engine.modules import ExpertLinear, Siblings

#: What the families call the function that turns queries and keys by their positions.
_ROTATION = "apply_rotary_pos_emb"
_GATED = {"gate_proj", "up_proj", "down_proj"}


def join_layers(model: nn.Module, backend: ModuleType) -> None:
    """Have the attention and the MLP of a model on a GPU, by families that compute as Llama does, take fewer launches.

    Each is tried first: where the family's own answer differs from the formula, it stays. Nothing changes for
    backends without such kernels.
    """
    rotations: dict[Any, bool] = {}
    gated: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        forward: Any = type(module).forward
        called = isinstance(forward, types.FunctionType) and _ROTATION in forward.__code__.co_names
        rotation = forward.__globals__.get(_ROTATION) if called else None
        if rotation and hasattr(backend, "rotate"):
            if rotation not in rotations:
                rotations[rotation] = _turns_halves(rotation)
            if rotations[rotation]:
                module.forward = _with_rotation(forward, _joined_rotation(rotation, backend.rotate), module)
        if hasattr(backend, "silu_product") and module._modules.keys() >= _GATED:
            if type(module) not in gated:
                gated[type(module)] = _is_gated_by_silu(module)
            if gated[type(module)]:
                module.forward = types.MethodType(_gated_forward(backend.silu_product), module)


@torch.inference_mode()
def find_siblings(model: nn.Module, linears: Iterable[ExpertLinear], backend: ModuleType) -> None:
    """See, in a forward pass of a few tokens, which linears are given the same input one after the other."""
    if not hasattr(backend, "expert_linears"):
        return
    seen: list[tuple[ExpertLinear, Tensor]] = []
    own = list(linears)
    hooks = [linear.register_forward_pre_hook(lambda layer, inputs: seen.append((layer, inputs[0]))) for linear in own]
    try:
        model(torch.zeros(1, 3, dtype=torch.long, device=own[0].weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(layer for layer, _ in seen)
    for _, together in itertools.groupby(seen, key=lambda call: id(call[1])):
        layers = [layer for layer, _ in together]
        if len(layers) > 1 and all(calls[layer] == 1 for layer in layers):
            siblings = Siblings(layers, backend)
            for layer in layers:
                layer.siblings = siblings


def _with_rotation(forward: Any, rotate: Callable[..., Any], module: nn.Module) -> Any:
    """A module's own forward method, with another function of the name."""
    joined = types.FunctionType(
        forward.__code__, {**forward.__globals__, _ROTATION: rotate}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    joined.__kwdefaults__ = forward.__kwdefaults__
    return types.MethodType(joined, module)


def _joined_rotation(own: Callable[..., Any], rotate: Callable[..., Any]) -> Callable[..., Any]:
    def joined(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        same = cos.shape == sin.shape == (1, query.shape[2], query.shape[3]) and key.shape[2:] == query.shape[2:]
        if rest or named or query.dim() != 4 or not same or not query.dtype == key.dtype == cos.dtype == sin.dtype:
            return own(query, key, cos, sin, *rest, **named)
        return rotate(query, key, cos, sin)

    return joined


def _turns_halves(rotation: Callable[..., Any]) -> bool:
    """Whether a family's function is x·cos + (-second half of x, first half)·sin."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 8, generator=generator) for _ in range(2))
    try:
        found = rotation(query, key, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):  # it takes something else
        return False
    for x, y in zip((query, key), found, strict=True):
        low, high = x.chunk(2, -1)
        expected = x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
        if y.shape != x.shape or not torch.allclose(y, expected, rtol=1e-6, atol=1e-6):
            return False
    return True


def _gated_forward(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(product(self.gate_proj(x), self.up_proj(x)))
        return y

    return forward


@torch.inference_mode()
def _is_gated_by_silu(module: Any) -> bool:
    """Whether a module computes down(silu(gate(x))·up(x))."""
    weight = module.gate_proj.weight
    x = torch.linspace(-2, 3, weight.shape[1], device=weight.device).to(weight.dtype)[None, None]
    try:
        found = module(x)
    except (TypeError, ValueError, RuntimeError):  # it takes something else
        return False
    expected = module.down_proj(nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))
    return isinstance(found, Tensor) and torch.equal(found, expected)
