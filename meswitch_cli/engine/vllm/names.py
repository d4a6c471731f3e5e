"""What is told to vLLM's workers: the layers of the base by transformers' names, and what slots must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meswitch_cli.engine.banks import Layout
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.model.architecture import Architecture
from meswitch_kernels import Capacity

#: Under this key of vLLM's `additional_config` stands what `worker_config` made.
CONFIG_KEY = "meswitch"


@dataclass(frozen=True)
class BaseNames:
    """Module names of a base's layers. Where the head is tied, its name is the head's own all the same."""

    linears: frozenset[str]
    norms: frozenset[str]
    embedding_name: str
    head_name: str
    vocabulary: int


def base_names(architecture: Architecture) -> BaseNames:
    """Sort the modules of an architecture.

    Raises:
        EngineError: it has no embedding or no head.
    """
    modules: dict[str, set[str]] = {"linear": set(), "embedding": set(), "head": set(), "dense": set()}
    vocabulary = 0
    for name, parameter in architecture.parameters.items():
        modules[parameter.kind].add(name.rpartition(".")[0])
        if parameter.kind == "embedding":
            vocabulary = parameter.shape[0]
    if len(modules["embedding"]) != 1 or len(modules["head"]) != 1:
        raise EngineError(f"{architecture.model_type}: one embedding and one head are served, not more or none")
    (embedding,), (head,) = modules["embedding"], modules["head"]
    norms = modules["dense"] - modules["linear"] - {head}
    return BaseNames(frozenset(modules["linear"]), frozenset(norms), embedding, head, vocabulary)


def worker_config(layout: Layout) -> dict[str, Any]:
    """A layout as JSON."""
    capacities = {name: asdict(capacity) for name, capacity in layout.capacities.items()}
    return {"capacities": capacities, "norms": sorted(layout.norms)}


def layout_of(config: Mapping[str, Any]) -> Layout:
    """The layout that `worker_config` wrote down."""
    capacities = {name: Capacity(**capacity) for name, capacity in config["capacities"].items()}
    return Layout(capacities, frozenset(config["norms"]))
