"""How much of the device the engine takes, from metadata alone."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.artifact.served import slot_entries
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.skeleton import skeleton
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import expected_entry
from meswitch_cli.engine.bank_layout import bank_layout, capacity_of, slot_bits
from meswitch_cli.engine.base_model import BaseModel, gain_weight
from meswitch_cli.errors import CheckpointError, UsageError
from meswitch_cli.model.architecture import Architecture, Parameter, architecture
from meswitch_cli.model.dtype import model_dtype
from meswitch_kernels import Capacity, ExpertBank

#: What the cache of keys and values takes on a CPU unless told otherwise, or one longest request if that is more.
CPU_CACHE_BYTES = 512 << 20
#: The share of a GPU's free memory that transformers gives the cache and the tensors that scale with it.
GPU_CACHE_SHARE = 0.9
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MemoryPlan:
    """Where the bytes of a device go. What remains negative does not fit.

    Attributes:
        base_nbytes: the base's weights.
        slot_nbytes: one slot; every tensor of its expert is taken to differ from the base's.
        shared_nbytes: of the slots together, whatever their number.
        token_nbytes: keys and values of one token.
        most_slots: slots that fit beside one request of `context` tokens.
        layers: decoder layers.
        multiplied: weights that every token of a prompt meets, those of linears and head.
        base_read_nbytes, slot_read_nbytes: of the base and of a slot, what a decode step reads in full: all but the
            embedding, of which it reads single rows.
        bits: those that a slot holds of a weight of the widest linear, where artifacts said what there is; else 0.
    """

    device_nbytes: int
    base_nbytes: int
    slot_nbytes: int
    shared_nbytes: int
    slots: int
    experts: int
    context: int
    token_nbytes: int
    layers: int = 0
    multiplied: int = 0
    base_read_nbytes: int = 0
    slot_read_nbytes: int = 0
    bits: float = 0

    @property
    def slots_nbytes(self) -> int:
        return self.slots * self.slot_nbytes + self.shared_nbytes

    @property
    def left_nbytes(self) -> int:
        return self.device_nbytes - self.base_nbytes - self.slots_nbytes

    @property
    def cache_tokens(self) -> int:
        return max(0, int(self.left_nbytes * GPU_CACHE_SHARE)) // self.token_nbytes

    @property
    def requests(self) -> int:
        """Requests of `context` tokens whose cache fits at once."""
        return self.cache_tokens // self.context

    @property
    def most_slots(self) -> int:
        one = -(-self.context * self.token_nbytes // GPU_CACHE_SHARE)
        room = self.device_nbytes - self.base_nbytes - self.shared_nbytes - one
        return max(0, int(room // self.slot_nbytes))


def plan_memory(
    base: Checkpoint,
    settings: Mapping[str, QuantizerSettings],
    *,
    device_nbytes: int,
    experts: int,
    slots: int | None = None,
    context: int = 4096,
    dtype: str = "auto",
    added_rows: int = 0,
    like: Sequence[Manifest] = (),
    adapter_rank: int | None = None,
    messages: bool = False,
) -> MemoryPlan:
    """Plan for `experts` artifacts made with these settings by kind, `slots` of them on the device at once (None: all);
    or for experts like some artifacts, whose slots hold any of them.

    With `messages` slots hold trellis codes as they are stored, as on a GPU; elsewhere they are decoded when they are
    loaded. With `adapter_rank` they are adapters of this rank, on every linear of the decoder layers, and nothing else.

    Raises:
        CheckpointError: the base is not one that can be served.
        UsageError: a number is impossible.
    """
    for name, value in (("--experts", experts), ("--slots", slots or 1), ("--context", context)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    where = str(base.source.path)
    described = architecture(base.config, where)
    _refuse_unserved(described, where)
    model: Any = skeleton(base.config, where)
    chosen = model_dtype(base, dtype)
    weights = sum(math.prod(item.shape) for item in described.parameters.values() if not item.tied_to)
    if like:
        capacities = _capacities_of(described, like, messages=messages)
    elif adapter_rank is None:
        capacities = expected_capacities(described.parameters, settings, added_rows, messages=messages)
    else:
        capacities = adapter_capacities(described.parameters, adapter_rank)
    multiplied = sum(math.prod(item.shape) for item in described.parameters.values() if item.kind in ("linear", "head"))
    read = {name: capacities[name] for name in capacities.keys() - _embeddings_apart(described.parameters)}

    def of_slots(count: int) -> int:
        return _slots_nbytes(model, capacities, count, chosen, norms=adapter_rank is None)

    return MemoryPlan(
        device_nbytes=device_nbytes,
        base_nbytes=weights * chosen.itemsize,
        slot_nbytes=of_slots(2) - of_slots(1),
        shared_nbytes=of_slots(0),
        slots=slots or experts,
        experts=experts,
        context=context,
        token_nbytes=token_bytes(model.config, chosen.itemsize),
        layers=described.num_layers,
        multiplied=multiplied,
        base_read_nbytes=multiplied * chosen.itemsize,
        slot_read_nbytes=_slots_nbytes(model, read, 2, chosen) - _slots_nbytes(model, read, 1, chosen),
        bits=max(
            (slot_bits(e, messages=messages) for m in like for e in slot_entries(m) if e.kind == "linear"), default=0
        ),
    )


@dataclass(frozen=True)
class _Names:
    """A family's layers by name. Implements `LayerNames`."""

    linears: frozenset[str]
    norms: frozenset[str]
    embedding_name: str
    head_name: str
    whole: frozenset[str] = frozenset()


def _capacities_of(described: Architecture, manifests: Sequence[Manifest], *, messages: bool) -> dict[str, Capacity]:
    """The capacity of each bank, by module name, that holds any of some artifacts.

    Raises:
        EngineError: one changes a parameter that this base does not serve.
    """

    def modules(*kinds: str) -> list[str]:
        return [name.rpartition(".")[0] for name, item in described.parameters.items() if item.kind in kinds]

    linears, heads = frozenset(modules("linear")), modules("head")
    embedding = described.embedding.rpartition(".")[0]
    others = frozenset(modules("dense")) - linears - {*heads, embedding}
    names = _Names(linears, others, embedding, heads[0] if heads else "")
    return bank_layout(names, manifests, messages=messages).capacities


def _refuse_unserved(described: Architecture, where: str) -> None:
    """Refuse a base with matrices in which no expert is served: experts of a mixture, convolutions, Conv1D."""
    for name, item in described.parameters.items():
        if item.stacked or item.transposed or (item.kind == "dense" and len(item.shape) > 1):
            raise CheckpointError(
                f"{where}: {described.model_type} is served one request at a time at most, whose memory cannot be "
                f"planned: {name} is in no layer that has banks in batches on a card"
            )


def _embeddings_apart(parameters: Mapping[str, Parameter]) -> set[str]:
    """Modules of embeddings that no head reads."""
    if not any(item.kind == "head" and not item.tied_to for item in parameters.values()):
        return set()
    return {name.rpartition(".")[0] for name, item in parameters.items() if item.kind == "embedding"}


def adapter_capacities(parameters: Mapping[str, Parameter], rank: int) -> dict[str, Capacity]:
    """The capacity of each bank, by module name, for adapters of every linear of the decoder layers."""
    linears = {name: item for name, item in parameters.items() if item.kind == "linear"}
    return {name.rpartition(".")[0]: Capacity(rank=min(rank, *item.shape)) for name, item in linears.items()}


def expected_capacities(
    parameters: Mapping[str, Parameter],
    settings: Mapping[str, QuantizerSettings],
    added_rows: int,
    *,
    messages: bool = False,
) -> dict[str, Capacity]:
    """The capacity of each bank, by module name, for experts made with these settings that change every tensor.

    Raises:
        UsageError: more salient channels than a layer has inputs.
    """
    capacities: dict[str, Capacity] = {}
    for name, item in parameters.items():
        quantizer = settings.get(item.kind)
        if quantizer is None or item.tied_to:
            continue
        rows, columns = item.shape
        if quantizer.salient > columns:
            raise UsageError(f"--salient {quantizer.salient}: {name} has only {columns} input channels")
        grown = item.shape if item.kind == "linear" else (rows + added_rows, columns)
        capacity = capacity_of(expected_entry(quantizer, grown, item.shape), messages=messages)
        if item.kind == "head":  # experts that tie it load their embedding's delta there
            tied = expected_entry(settings["embedding"], grown, item.shape)
            capacity = capacity.joined(capacity_of(tied, messages=messages))
        capacities[name.rpartition(".")[0]] = capacity
    return capacities


def token_bytes(config: Any, itemsize: int) -> int:
    """Bytes of keys and values of one token, all layers; `config` is transformers' own."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * itemsize)


def cache_pages(base: BaseModel, tokens: int | None, page_size: int, max_model_len: int) -> int | None:
    """Blocks of the cache; None leaves the choice to transformers, which takes what a GPU has left."""
    if tokens is None:
        if base.device.type != "cpu":
            return None
        tokens = max(max_model_len, CPU_CACHE_BYTES // token_bytes(base.model.config, base.dtype.itemsize))
    return -(-max(tokens, max_model_len) // page_size)


def parse_bytes(text: str, option: str) -> int:
    """A number of bytes from an option's text such as `80GB`, `24GiB` or `500000000`.

    Raises:
        UsageError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{option}: {text!r} is no amount of bytes; write 80GB, 24GiB or a number")
    return int(float(match[1]) * unit)


def _slots_nbytes(
    model: Any, capacities: Mapping[str, Capacity], slots: int, dtype: torch.dtype, *, norms: bool = True
) -> int:
    total = 0
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if name in capacities and weight is not None:
            out_features, in_features = weight.shape
            one, two = (
                ExpertBank(count, in_features, out_features, capacities[name], dtype, "meta").nbytes for count in (1, 2)
            )
            total += 2 * one - two + slots * (two - one)
            if capacities[name].added_rows and "bias" in own:
                total += (slots + 1) * capacities[name].added_rows * dtype.itemsize
        elif norms and weight is not None and weight.dim() == 1:
            # As `Banks` does: Gemma's gains, 1 + weight, are kept in fp32.
            norm: Any = copy.deepcopy(module).to_empty(device="cpu")
            itemsize = dtype.itemsize if gain_weight(norm) == 1.0 else 4
            total += (slots + 1) * weight.shape[0] * itemsize * len(own)
    return total
