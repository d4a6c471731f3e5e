"""What is told to vLLM's workers: the layers of the base by transformers' names, and what slots must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from meswitch_cli.engine.bank_layout import Layout
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.model.architecture import Architecture
from meswitch_kernels import Capacity

#: Under this key of vLLM's `additional_config` stands a `WorkerConfig`.
CONFIG_KEY = "meswitch"


@dataclass(frozen=True)
class BaseNames:
    """Module names of a base's layers. Where the head is tied, its name is the head's own all the same."""

    linears: frozenset[str]
    norms: frozenset[str]
    embedding_name: str
    head_name: str
    vocabulary: int
    #: What only mixtures have, which this engine does not serve.
    whole: frozenset[str] = frozenset()


#: Families whose tokens vLLM 0.32 does not compute as transformers does, in the table of `python tests bench families`.
DIFFERING = frozenset({"cohere2", "hunyuan_v1_dense"})


def base_names(architecture: Architecture) -> BaseNames:
    """Sort the modules of an architecture.

    Raises:
        EngineError: it has no embedding or no head, is a mixture of experts, or is computed otherwise by vLLM.
    """
    if architecture.model_type in DIFFERING:
        raise EngineError(
            f"{architecture.model_type} is computed otherwise by vLLM than by transformers; use --engine transformers"
        )
    stacked = next((name for name, parameter in architecture.parameters.items() if parameter.stacked), None)
    if stacked is not None:
        raise EngineError(
            f"{architecture.model_type} is a mixture of experts, such as {stacked}, which --engine vllm does not "
            "serve; use --engine transformers"
        )
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
    # JSON has made lists of tuples.
    capacities = {
        name: Capacity(**capacity | {"messages": tuple(capacity["messages"])})
        for name, capacity in config["capacities"].items()
    }
    return Layout(capacities, frozenset(config["norms"]))


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What workers are told.

    Attributes:
        host_bytes: the most that copies of experts take of each worker's host memory; None: each has its share of what
            `EngineSettings` takes by itself.
        loras: whether vLLM's own LoRAs are served beside experts.
        checked: whether a server of ours has checked each expert, whose name then ends with `@` and its digest.
        fingerprint: the base's, where it has not.
        max_wait: seconds that an adapter may wait for a slot before one in use must let go of its own; None: for as
            long as vLLM has it wait, or until a table of ours says that it may run.
    """

    layout: Layout
    host_bytes: int | None
    loras: bool = False
    checked: bool = True
    fingerprint: str = ""
    max_wait: float | None = None

    @classmethod
    def of(cls, additional_config: Mapping[str, Any]) -> WorkerConfig:
        """Read it out of vLLM's `additional_config`."""
        config = additional_config[CONFIG_KEY]
        return cls(**(config | {"layout": layout_of(config["layout"])}))

    def additional_config(self) -> dict[str, Any]:
        """It as vLLM's `additional_config`."""
        members = {field.name: getattr(self, field.name) for field in fields(self)}
        return {CONFIG_KEY: members | {"layout": worker_config(self.layout)}}
