"""What of a config changes what a model computes, asked of the model itself: no weight is read or allocated.

The model that a config describes is built on the meta device and run there once, on shapes alone. What its layers read
meanwhile, of the config and of their own attributes, is what counts, beside the layers and their buffers themselves.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from meswitch_cli.checkpoint.config import parsed_config
from meswitch_cli.checkpoint.skeleton import skeleton
from meswitch_cli.errors import CheckpointError, reason_of

#: Entries that speak of the vocabulary, in which each expert has its own tokenizer, ids, embedding and head, or of what
#: whoever runs the model decides: number type, implementation of attention, what else is returned.
_DECIDED_ELSEWHERE = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "vocab_size",
    "tie_word_embeddings", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "auto_map", "quantization_config",
)  # fmt: skip
#: Parts of names of what training alone uses, read also where a model is not trained.
_TRAINING = ("drop", "gradient_checkpointing")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_TOKENS = 8
_MOST_LEVELS = 4
_ABSENT = object()

#: Whose attribute, and its name.
Place = tuple[str, str]


def model_differences(base: dict[str, Any], expert: dict[str, Any]) -> list[str]:
    """The entries, by transformers' names, under which an expert's layers compute differently from its base's.

    Weights apart, and what `_DECIDED_ELSEWHERE` names. An entry that no layer reads makes no difference. Where the
    model cannot be run on shapes alone, every entry that differs is taken to make one.

    Raises:
        CheckpointError: transformers cannot build the model of one of the two.
    """
    ours = _parsed(base)
    theirs = _decided_as(_parsed(expert), ours)
    return list(_differences(json.dumps(ours, sort_keys=True), json.dumps(theirs, sort_keys=True)))


@functools.lru_cache(maxsize=256)
def _differences(ours_text: str, theirs_text: str) -> tuple[str, ...]:
    ours, theirs = json.loads(ours_text), json.loads(theirs_text)
    differing = [key for key in sorted({*ours, *theirs}) if ours.get(key, _ABSENT) != theirs.get(key, _ABSENT)]
    if not differing:
        return ()
    base, expert = _base_model(ours_text), ModelTraits.of(theirs)
    if base is None or expert is None:
        return tuple(differing)
    if base.computes_as(expert):
        return ()
    return tuple(key for key in differing if _matters(key, base, ours, theirs)) or tuple(differing)


@functools.lru_cache(maxsize=4)
def _base_model(text: str) -> ModelTraits | None:
    return ModelTraits.of(json.loads(text))


def _matters(key: str, base: ModelTraits, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether an entry makes a difference by itself."""
    changed = {name: value for name, value in ours.items() if name != key}
    if key in theirs:
        changed[key] = theirs[key]
    try:
        found = ModelTraits.of(changed)
    except Exception:  # the entry does not go with the base's others
        return True
    return found is None or not base.computes_as(found)


def _parsed(config: dict[str, Any]) -> dict[str, Any]:
    """Every entry as transformers reads it, defaults and old spellings made out."""
    try:
        described = parsed_config(config)
    except Exception as error:  # transformers raises many kinds for an entry that it cannot use
        raise CheckpointError(f"config.json of a {config.get('model_type')}: {reason_of(error)}") from error
    return dict(json.loads(described.to_json_string(use_diff=False), object_hook=_one_spelling))


def _one_spelling(value: dict[str, Any]) -> dict[str, Any]:
    """A rope's kind under its present name alone."""
    return {key: item for key, item in value.items() if key != "type" or item != value.get("rope_type")}


def _decided_as(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A config with what is decided elsewhere as another has it, configs inside it likewise."""
    kept = {key: value for key, value in config.items() if key not in _DECIDED_ELSEWHERE}
    for key, value in other.items():
        if key in _DECIDED_ELSEWHERE:
            kept[key] = value
        elif isinstance(value, dict) and "model_type" in value and isinstance(kept.get(key), dict):
            kept[key] = _decided_as(kept[key], value)
    return kept


@dataclass(frozen=True)
class ModelTraits:
    """What a model computes, as far as its weights do not say it.

    Attributes:
        layers: every module's class and the shapes of its parameters, by name.
        buffers: their values, by name.
        held: every attribute of modules and configs, by owner and name.
        read: which of them a forward pass read.
    """

    layers: Mapping[str, Any]
    buffers: Mapping[str, torch.Tensor]
    held: Mapping[Place, Any]
    read: frozenset[Place]

    @classmethod
    def of(cls, config: dict[str, Any]) -> ModelTraits | None:
        """Build and run the model of a parsed config; None where it does not run on shapes alone.

        Raises:
            CheckpointError: transformers cannot build it.
        """
        model: Any = skeleton({key: value for key, value in config.items() if "attn_impl" not in key}, "config.json")
        model.set_attn_implementation("eager")  # which makes every mask, where others save themselves the trouble
        owners = _owners(model)
        held = {(name, key): value for name, owner in owners.items() for key, value in _attributes(owner).items()}
        layers = {
            name: (type(module), [(leaf, tuple(item.shape)) for leaf, item in module.named_parameters(recurse=False)])
            for name, module in model.named_modules()
        }
        read: set[Place] = set()
        ran = 0
        for answer in (True, False):  # whichever way the branches go that depend on values
            with contextlib.suppress(Exception), _recorded(owners, read), _AnyValue(answer), torch.no_grad():
                model(input_ids=torch.zeros(1, _TOKENS, dtype=torch.long, device="meta"), use_cache=False)
                ran += 1
        buffers = _buffers(model)
        return cls(layers, buffers, held, frozenset(read)) if ran and buffers is not None else None

    def computes_as(self, other: ModelTraits) -> bool:
        """Whether the two compute the same with the same weights."""
        return (
            self.layers == other.layers
            and self.buffers.keys() == other.buffers.keys()
            and all(_equal(value, other.buffers[name]) for name, value in self.buffers.items())
            and all(self.held.get(place, _ABSENT) == other.held.get(place, _ABSENT) for place in self.read | other.read)
        )


def _owners(model: Any) -> dict[str, Any]:
    """The modules, dropout aside, and the configs that they hold, each once, by name."""
    from transformers import PreTrainedConfig

    owners: dict[str, Any] = {}
    configs: set[int] = set()

    def add_config(name: str, config: Any) -> None:
        if not isinstance(config, PreTrainedConfig) or id(config) in configs:
            return
        configs.add(id(config))
        owners[name] = config
        for key, value in vars(config).items():
            add_config(f"{name}.{key}", value)

    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            owners[name] = module
        add_config(f"{name}.config", getattr(module, "config", None))
    return owners


def _attributes(owner: Any) -> dict[str, Any]:
    """What a module or a config holds beside parameters, buffers and submodules, and what it calls by a second name."""
    own = {key: value for key, value in vars(owner).items() if key not in _OF_EVERY_MODULE}
    if not isinstance(owner, nn.Module):
        own |= {key: own[name] for key, name in type(owner).attribute_map.items() if name in own}
    return {key: _plain(value) for key, value in own.items() if not any(part in key for part in _TRAINING)}


@contextlib.contextmanager
def _recorded(owners: Mapping[str, Any], read: set[Place]) -> Iterator[None]:
    """Note what is read of modules and configs. These alone are watched: other threads have models of their own."""
    classes = {name: type(owner) for name, owner in owners.items()}
    for name, owner in owners.items():
        owner.__class__ = _watching(name, classes[name], read)
    try:
        yield
    finally:
        for name, owner in owners.items():
            owner.__class__ = classes[name]


def _watching(owner: str, kind: type[Any], read: set[Place]) -> type[Any]:
    original: Any = kind.__getattribute__

    def get(self: Any, name: str) -> Any:
        read.add((owner, name))
        return original(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": get, "__module__": kind.__module__})


class _AnyValue(TorchFunctionMode):
    """Gives a tensor without values the one that is asked for, so that a model's branches can be taken."""

    def __init__(self, answer: bool) -> None:
        super().__init__()
        self._answers = {
            "__bool__": answer,
            "__contains__": False,
            "__float__": 1.0,
            "__int__": 1,
            "__index__": 1,
            "item": 1,
        }

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self._answers and isinstance(arguments[0], torch.Tensor) and arguments[0].is_meta:
            return self._answers[name]
        return function(*arguments, **(options or {}))


def _buffers(model: Any) -> dict[str, torch.Tensor] | None:
    """The buffers as they follow from the config: rotary tables, scales of embeddings. NaN where one does not.

    None where transformers cannot make them.
    """
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        for key, buffer in own.items():
            empty = float("nan") if buffer.is_floating_point() else 0
            setattr(module, key, torch.full(buffer.shape, empty, dtype=buffer.dtype))
        try:
            if own:
                model._init_weights(module)
        except Exception:  # of many kinds: some families initialise weights, which are not there, along with buffers
            return None
        found |= {f"{name}.{key}": getattr(module, key) for key in own}
    return found


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two buffers are the same, NaN where the other is NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _plain(value: Any, level: int = 0) -> Any:
    """A value that can be compared, whatever object it was: functions by name, tensors without values by shape."""
    from transformers import PreTrainedConfig

    if value is None or isinstance(value, bool | int | float | str | torch.dtype | enum.Enum):
        return value
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), None if value.is_meta else value.tolist())
    if isinstance(value, functools.partial):
        return (_plain(value.func), _plain(value.args), _plain(value.keywords))
    if level >= _MOST_LEVELS:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        return {str(key): _plain(item, level + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, level + 1) for item in value]
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    opaque = isinstance(value, nn.Module | PreTrainedConfig) or callable(value)  # what these hold, they hold themselves
    if opaque or not hasattr(value, "__dict__"):
        return name
    return (name, {key: _plain(item, level + 1) for key, item in vars(value).items()})
