"""What of a checkpoint's stored tensors is its model's, and whether its head is its own: as transformers loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from meswitch_cli.checkpoint.layout import CheckpointLayout
from meswitch_cli.checkpoint.skeleton import skeleton
from meswitch_cli.checkpoint.tensorfile import TensorInfo, equal_tensors, read_tensor
from meswitch_cli.errors import CheckpointError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIE_ENTRY = "tie_word_embeddings"
#: transformers drops these from any checkpoint whose model has such a buffer (`_adjust_missing_and_unexpected_keys`).
_MOVED_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class Contents:
    """A checkpoint as its model sees it.

    Attributes:
        config: config.json with `tie_word_embeddings` as the weights have it.
        tensors: what the model loads, by stored name; a tensor that no model knows is still among them.
        notes: what was decided against config.json, or is no part of the model.
        buffers: by module name, what the model loads into buffers whose values its class gives too.
        extras: by stored name, what the family's class leaves out when it loads, and others read: `mtp.*`.
    """

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...]
    buffers: dict[str, TensorInfo]
    extras: dict[str, TensorInfo]


def model_contents(config: dict[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> Contents:
    """Leave out what transformers computes from the config, tell what it does not load, and decide what is tied.

    Raises:
        CheckpointError: transformers cannot build the model; a tensor is stored twice, in a type that is not read, or
            in another shape than a buffer's.
    """
    model: Any = skeleton(config, where)
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    held = held_parameters(model)
    parameters = set(held)
    layout = CheckpointLayout(model, held, buffers)
    stored = layout.canonical(tensors)
    derived = _DerivedBuffers(model, parameters, buffers)
    kept: dict[str, TensorInfo] = {}
    loaded: dict[str, TensorInfo] = {}
    extras: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        own = stored[name]
        if layout.is_known(own) and own not in buffers - parameters:
            kept[name] = info
        elif own in derived.saved:
            loaded[name] = info
        elif derived.has(own, info):
            continue
        elif derived.is_ignored(own):
            extras[name] = info
        else:
            kept[name] = info
    _refuse_two_names({name: stored[name] for name in (*kept, *loaded)}, where)
    for name, info in loaded.items():
        shape = tuple(model.get_buffer(stored[name]).shape)
        if info.shape != shape:
            raise CheckpointError(f"{info.path}: buffer {name!r} is {list(info.shape)}, config.json says {list(shape)}")
    for info in kept.values():
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is {info.dtype}; weights must be bf16, fp16 or fp32"
            )
    notes = []
    if extras:
        notes.append(
            f"{where}: {len(extras)} tensors are no part of what transformers runs as {config['model_type']}, such as "
            f"{next(iter(extras))!r}: they are carried along"
        )
    by_own = {stored[name]: info for name, info in kept.items()}
    untied = _stored_apart(getattr(model, "all_tied_weights_keys", None) or {}, by_own, where)
    if untied:
        config = config | {TIE_ENTRY: False}
        notes.append(
            f"{where}: config.json says {TIE_ENTRY}, but {untied!r} is stored and differs from what it would be tied "
            "to: it is kept as it is, as transformers does"
        )
    return Contents(config, kept, tuple(notes), {stored[name]: info for name, info in loaded.items()}, extras)


def held_parameters(model: Any) -> dict[str, torch.Tensor]:
    """What of a module tree on the meta device a checkpoint holds: parameters, and buffers with values of their own.

    These are of floating-point type, saved, and no table that the class computes from its config: the bias by which
    DeepSeek balances its experts.
    """
    held = dict(model.named_parameters(remove_duplicate=False))
    saved = set(model.state_dict())
    buffers = [
        name
        for name, buffer in model.named_buffers()
        if name in saved and buffer.is_floating_point() and not any(re.search(item, name) for item in _MOVED_BUFFERS)
    ]
    modules = dict(model.named_modules())
    for name in buffers:
        path, _, leaf = name.rpartition(".")
        if not _is_computed(model, modules[path], leaf):
            held[name] = getattr(modules[path], leaf)
    return held


def _is_computed(model: Any, module: Any, leaf: str) -> bool:
    """Whether initialising a module fills a buffer with different numbers, so that it follows from the config."""
    buffer = getattr(module, leaf)
    values = torch.full(buffer.shape, float("nan"), dtype=buffer.dtype)
    setattr(module, leaf, values)
    try:
        model._init_weights(module)
        values = getattr(module, leaf)
    except Exception:  # of many kinds: some families initialise weights, which are not there, along with buffers
        return False
    finally:
        setattr(module, leaf, buffer)
    if values.is_meta or values.isnan().all():
        return False
    return not bool((values == values.flatten()[0]).all())


def _refuse_two_names(stored: Mapping[str, str], where: str) -> None:
    seen: dict[str, str] = {}
    for name, own in stored.items():
        if own in seen:
            raise CheckpointError(f"{where}: holds {own!r} twice, as {seen[own]!r} and as {name!r}")
        seen[own] = name


class _DerivedBuffers:
    """Which stored tensors follow from the config, read off the model that the config builds.

    Attributes:
        saved: buffers that transformers saves and loads, parameters apart.
    """

    def __init__(self, model: Any, parameters: set[str], buffers: set[str]) -> None:
        self._buffers = buffers
        kept = buffers & set(model.state_dict())
        self.saved = {name for name in kept if not any(re.search(item, name) for item in _MOVED_BUFFERS)} - parameters
        self._modules = dict(model.named_modules())
        #: Last parts of the names of modules that compute something from the config and learn nothing: `rotary_emb`.
        self._computing = {
            name.rpartition(".")[2]
            for name, module in self._modules.items()
            if next(module.buffers(), None) is not None and next(module.parameters(), None) is None
        }
        self._leaves = {_leaf(name) for name in buffers - kept} - {_leaf(name) for name in parameters}
        moved = {pattern for pattern in _MOVED_BUFFERS if any(re.search(pattern, name) for name in buffers)}
        self._patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()) | moved

    def has(self, own: str, info: TensorInfo) -> bool:
        """Whether a tensor that is neither a parameter nor loaded into a buffer follows from the config."""
        path, _, leaf = own.rpartition(".")
        return (
            own in self._buffers
            or leaf in self._leaves
            or _leaf(path) in self._computing
            or (path in self._modules and (_is_mask(info) or leaf == "masked_bias"))
            or _is_range(info)
        )

    def is_ignored(self, own: str) -> bool:
        """Whether the family's class leaves such names out when it loads."""
        return any(re.search(pattern, own) for pattern in self._patterns)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_mask(info: TensorInfo) -> bool:
    """Whether this has the shape of a causal mask over all positions, which old checkpoints carry."""
    return len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]


def _is_range(info: TensorInfo) -> bool:
    """Whether this is 0, 1, 2, ... as integers: position ids."""
    if info.dtype not in (torch.int64, torch.int32) or not info.numel or info.shape[-1] != info.numel:
        return False
    return torch.equal(read_tensor(info).flatten(), torch.arange(info.numel, dtype=info.dtype))


def _stored_apart(ties: Mapping[str, str], stored: Mapping[str, TensorInfo], where: str) -> str | None:
    """The stored name of a tensor that config.json ties to another and that differs from it, else None.

    transformers compares after it has cast both to the type in which it loads; here they are compared as stored.

    Raises:
        CheckpointError: others of the model's ties hold, which no config.json can say.
    """
    apart = [
        target
        for target, source in ties.items()
        if target in stored and source in stored and not equal_tensors(stored[target], stored[source])
    ]
    if not apart:
        return None
    together = sorted(target for target in ties if target not in stored)
    if together:
        raise CheckpointError(
            f"{where}: {stored[apart[0]].name!r} is stored and differs from what config.json ties it to, "
            f"{together[0]!r} is not stored; meswitch ties both or neither"
        )
    return stored[apart[0]].name
