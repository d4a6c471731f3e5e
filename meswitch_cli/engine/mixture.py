"""Mixtures of experts: of the many small networks of a layer a router gives each token a few.

transformers holds their matrices as one parameter; a fine-tune's artifact has a delta of each. Here each matrix is a
linear with a bank, and a router has weights of its own in every slot. Which tokens a network gets is known when the
router has chosen, so this is for a CPU: it reads indices, and no graph can be captured of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from meswitch_cli.checkpoint.layout import Group
from meswitch_cli.engine.batch import CurrentBatch
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.modules import ExpertLinear
from meswitch_cli.model.architecture import Architecture

#: The name under which transformers knows `compute`.
NAME = "meswitch_by_slot"
#: What transformers says of a module whose networks are two products and what is between them; see its `moe.py`.
_PLAIN = {"has_bias": False, "is_transposed": False, "has_post_expert_norm": False}


@dataclass(frozen=True)
class Mixture:
    """The matrices of a layer's networks, by network; the outputs of `up`'s linears lie side by side in memory."""

    up: tuple[tuple[ExpertLinear, ...], ...]
    down: tuple[tuple[ExpertLinear, ...], ...]
    current: CurrentBatch

    def product(self, linears: Sequence[ExpertLinear], x: Tensor, tokens: Tensor) -> Tensor:
        """`[tokens, out]` of one network's linears for `x` `[tokens, in]`, which `tokens` says the places of."""
        batch = self.current.batch
        if batch is None or all(linear.bank is None for linear in linears):
            parts = [nn.functional.linear(x, linear.weight) for linear in linears]
        else:
            slots, groups = batch.of_some(tokens)
            parts = [linear.product(x, slots, groups) for linear in linears]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def compute(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A mixture's output `[tokens, hidden]`; `top_k_index` and `top_k_weights` are `[tokens, networks of a token]`."""
    served: Mixture = module.served
    result = torch.zeros_like(hidden_states)
    for network in sorted(set(top_k_index.flatten().tolist())):
        tokens, place = torch.where(top_k_index == network)
        y = served.product(served.up[network], hidden_states[tokens], tokens)
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = served.product(served.down[network], y, tokens)
        result.index_add_(0, tokens, (y * top_k_weights[tokens, place, None]).to(result.dtype))
    return result


class ExpertRouter(nn.Module):
    """What chooses the networks of a token, by the weights of the token's own slot."""

    def __init__(self, base: Any, current: CurrentBatch) -> None:
        super().__init__()
        self.base, self.current = base, current
        #: By parameter of `base`, `[slots + 1, ...]`; the first is the base's.
        self.tables: dict[str, Tensor] = {}

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        batch = self.current.batch
        if batch is None or not self.tables:
            return self.base(hidden_states, *rest, **named)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        slots, _ = batch.of_tokens(rows.shape[0])
        places, answers = [], []
        for slot in sorted(set(slots.tolist())):
            places.append((slots == slot).nonzero()[:, 0])
            own = {leaf: table[slot + 1] for leaf, table in self.tables.items()}
            answers.append(torch.func.functional_call(self.base, own, (rows[places[-1]], *rest), named))
        order = torch.cat(places).argsort()
        if isinstance(answers[0], tuple):
            return tuple(torch.cat(parts)[order] for parts in zip(*answers, strict=True))
        return torch.cat(answers)[order]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def find_routers(model: nn.Module, described: Architecture) -> dict[str, nn.Module]:
    """What stands beside the networks of mixtures with a matrix of its own and is no linear, by module name."""
    return {
        name: module
        for owner in _owners(described)
        for name, module in _beside(model, owner)
        if type(module) not in (nn.Linear, nn.Embedding)
        and max((parameter.dim() for parameter in module.parameters(recurse=False)), default=0) == 2
    }


def serve_mixtures(
    model: Any, described: Architecture, where: str, current: CurrentBatch, backend: ModuleType
) -> tuple[dict[str, ExpertLinear], set[str]]:
    """Have a model's mixtures computed by `compute`.

    Returns the linears that they are made of, by the names that artifacts have, and the modules that held them.

    Raises:
        EngineError: networks are computed otherwise than as two products.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    owners = _owners(described)
    linears: dict[str, ExpertLinear] = {}
    for owner, stacks in owners.items():
        module = model.get_submodule(owner)
        names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
        plain = all(getattr(module, key, None) == value for key, value in _PLAIN.items())
        simple = all(
            piece.place and piece.name.endswith(".weight") for group in stacks.values() for piece in group.pieces
        )
        own = {leaf for leaf, _ in module.named_parameters(recurse=False)}
        if not plain or not simple or own != set(names) or own != set(stacks):
            raise EngineError(
                f"{where}: {described.model_type} keeps {owner}.{min(own)} in a {type(module).__name__}, which "
                "is not served in batches"
            )
        made = [_linears(module.get_parameter(name), stacks[name], current, backend) for name in names]
        linears |= {name: linear for stack in made for network in stack for name, linear in network.items()}
        up, down = (tuple(tuple(network.values()) for network in stack) for stack in made)
        module.served = Mixture(up, down, current)
    if owners:
        ALL_EXPERTS_FUNCTIONS.register(NAME, compute)
        model.set_experts_implementation(NAME)
    return linears, set(owners)


def _owners(described: Architecture) -> dict[str, dict[str, Group]]:
    """By the name of a module that holds stacks of matrices, these by their own."""
    owners: dict[str, dict[str, Group]] = {}
    for name in described.held:
        group = described.layout.groups[name]
        if group.stack:
            owner, _, leaf = name.rpartition(".")
            owners.setdefault(owner, {})[leaf] = group
    return owners


def _beside(model: nn.Module, owner: str) -> Iterator[tuple[str, nn.Module]]:
    parent, _, own = owner.rpartition(".")
    for leaf, module in model.get_submodule(parent).named_children():
        if leaf != own:
            yield f"{parent}.{leaf}" if parent else leaf, module


def _linears(
    stack: nn.Parameter, group: Group, current: CurrentBatch, backend: ModuleType
) -> list[dict[str, ExpertLinear]]:
    """Linears by module name, for each matrix of a stack, in the order of their rows there; they share its memory."""
    made: list[dict[str, ExpertLinear]] = [{} for _ in range(group.stack)]
    for piece in sorted(group.pieces, key=lambda piece: piece.place or ("", 0, 0)):
        assert piece.place is not None
        _, index, row = piece.place
        rows, columns = piece.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(stack.detach()[index, row : row + rows], requires_grad=False)
        made[index][piece.name.removesuffix(".weight")] = ExpertLinear(linear, current, backend)
    return made
