"""A small model that computes as a large one does: each kind of layer, few of each, all narrow, random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from meswitch_cli.checkpoint.config import parsed_config
from meswitch_cli.checkpoint.skeleton import auto_class, skeleton
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.errors import CheckpointError, reason_of
from meswitch_cli.model.architecture import architecture

VOCABULARY = 160
LEAST_LAYERS = 2
HEADS, HEAD_DIM = 4, 16
#: Width of the hidden states where a family's heads together are not as wide: 4 heads of 16 are 64.
NARROWER = 48
INTERMEDIATE = 96
#: Tokens that a layer looks back, so that prompts of a page or two leave the window.
WINDOW = 12
#: The most of each other entry that is a width, by name.
_WIDTHS = {
    "rotary_dim": 8, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": HEAD_DIM, "qk_nope_head_dim": HEAD_DIM,
    "qk_head_dim": 2 * HEAD_DIM, "v_head_dim": HEAD_DIM,
}  # fmt: skip
#: What families call the number of experts in a mixture, and the most that are left.
_EXPERTS, EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"), 16
#: What families call the number of layers of an encoder of images or sounds.
_PART_LAYERS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers")
#: How many layers come before those with a mixture of experts.
_DENSE_FIRST = "first_k_dense_replace"
#: How many of the last layers read keys and values of others before them, of their own kind.
_SHARING = "num_kv_shared_layers"
#: What differs in single layers, by their index.
_OWN_ENTRIES = "per_layer_config"
#: A model that cannot be made smaller than this is not proven: it would take seconds, and gigabytes.
MOST_PARAMETERS = 100_000_000
_SEED = 20

Config = dict[str, Any]


def small_model(config: Config, dtype: torch.dtype) -> tuple[Config, Any]:
    """The smallest model of a config's class that runs, with random weights that `dtype` holds exactly, and its config.

    Raises:
        EngineError: there is none.
        CheckpointError: transformers cannot build the large one either, or it has weights of an unknown kind.
    """
    classes, reason = _classes(skeleton(config, "config.json")), ""
    for narrow in (narrowed, with_short_mlps, as_wide):
        try:
            small = small_config(config, narrow)
            _check_size(skeleton(small, "config.json"), classes)
        except Exception as error:  # many kinds, for entries that do not go together any more
            reason = reason or reason_of(error)
            continue
        try:
            architecture(small, "config.json")
            return small, _working_model(small, dtype)
        except CheckpointError:
            raise
        except Exception as error:  # as above
            reason = reason or reason_of(error)
    raise EngineError(
        f"the embedded engine does not serve {config.get('model_type')}: it cannot be tried, as no small model of it "
        f"could be made: {reason}"
    )


def _check_size(model: torch.nn.Module, classes: set[type[torch.nn.Module]]) -> None:
    """ValueError: a model lacks modules of one of these classes, or is not small."""
    if lost := classes - _classes(model):
        raise ValueError(f"it would lack {min(kind.__name__ for kind in lost)}")
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
        raise ValueError(f"more than {MOST_PARAMETERS:,} parameters")


def _working_model(config: Config, dtype: torch.dtype) -> Any:
    """A small model that gives logits. ValueError: it gives none."""
    model = random_model(config, dtype)
    tokens = torch.arange(16)[None] % len(model.get_input_embeddings().weight)
    logits = model(tokens, use_cache=False).logits
    if not torch.isfinite(logits).all() or not float(logits.std()):
        raise ValueError("its logits are not finite, or all the same")
    return model


def _classes(model: torch.nn.Module) -> set[type[torch.nn.Module]]:
    return {type(module) for module in model.modules()}


def random_model(config: Config, dtype: torch.dtype) -> Any:
    """A model in fp32 under whose weights every part of it shows in the logits."""
    model = build_random(config)
    generator = torch.Generator().manual_seed(_SEED)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            noise = parameter + 0.1 * noise
        else:
            noise *= 0.3 if id(parameter) in embeddings else 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(noise.to(dtype))
    return model


def build_random(config: Config, attention: str | None = None) -> Any:
    """A config's model in fp32, with the weights that its family begins with; `attention` by transformers' name."""
    options = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(_SEED)
    model: Any = auto_class(config).from_config(parsed_config(config), dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


Narrowing = Callable[[Config, Mapping[str, str]], None]


def narrowed(config: Config, names: Mapping[str, str]) -> None:
    """Few narrow heads, and all that is as wide as the hidden states likewise; `names` are the family's own.

    Heads stay grouped, shared or apart, and the hidden states as wide as the heads together or not.
    """
    with_short_mlps(config, names)
    hidden, heads, shared, width = (
        config.get(names.get(key, key))
        for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if not isinstance(hidden, int):
        return
    heads = heads if isinstance(heads, int) else HEADS
    shared, width = shared or heads, width or hidden // heads
    small_heads, small_width = min(HEADS, heads), min(HEAD_DIM, width)
    together = small_heads * small_width
    small_hidden = min(hidden, together if hidden == heads * width else NARROWER)
    small_shared = small_heads if shared == heads else 1 if shared == 1 else max(1, small_heads // 2)
    changed = {
        "num_attention_heads": (heads, small_heads),
        "num_key_value_heads": (shared, small_shared),
        "head_dim": (width, small_width),
    }
    for key, value in config.items():
        if value == hidden and isinstance(value, int) and not any(part in key for part in ("posi", "vocab", "window")):
            config[key] = small_hidden
    for key, (old, new) in changed.items():
        if isinstance(config.get(names.get(key, key)), int):
            config[names.get(key, key)] = new
        for entries in (config.get(_OWN_ENTRIES) or {}).values():
            if key in entries:
                entries[key] = max(1, entries[key] * new // old)
    for key, most in _WIDTHS.items():
        if isinstance(config.get(key), int):
            config[key] = min(config[key], most)
    for key in _EXPERTS:
        if isinstance(config.get(key), int):
            config[key] = min(config[key], EXPERTS)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), dict):
            _narrow_rope(config[key], width, small_width)


def with_short_mlps(config: Config, names: Mapping[str, str]) -> None:
    """The MLPs alone narrower, and windows shorter."""
    for key, value in config.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if value > INTERMEDIATE and ("intermediate" in key or "ffn" in key or key == "n_inner"):
            config[key] = INTERMEDIATE
        elif key == "sliding_window":
            config[key] = min(value, WINDOW)


def as_wide(config: Config, names: Mapping[str, str]) -> None:
    """All as wide as it is."""


def small_config(config: Config, narrow: Narrowing = narrowed) -> Config:
    """The config of a model of the same class with few layers, a small vocabulary, and what `narrow` makes of the rest.

    Raises:
        Exception: of many kinds, where transformers cannot read the config, or its entries do not go together.
    """
    described = parsed_config(config)
    small: Config = json.loads(described.to_json_string(use_diff=False))
    small = {key: value for key, value in small.items() if key[0] != "_"}
    text = described.get_text_config()
    place = next((key for key, value in vars(described).items() if value is text and value is not described), None)
    inner, names = small if place is None else small[place], type(text).attribute_map
    hidden = inner.get("hidden_size")
    _take_layers(inner, names.get("num_hidden_layers", "num_hidden_layers"), int(text.num_hidden_layers))
    narrow(inner, names)
    for key, part in small.items():
        if key != place and isinstance(part, dict) and "model_type" in part:
            _shorten_part(part, narrow, hidden, inner.get("hidden_size"))
    for level in (small, inner):
        _shorten_vocabulary(level, names.get("vocab_size", "vocab_size"))
    return small


def _shorten_part(part: Config, narrow: Narrowing, hidden: Any, small_hidden: Any) -> None:
    """An encoder of images or sounds with few narrow layers, whose output is as wide as the text model."""
    for name in _PART_LAYERS:
        if isinstance(part.get(name), int):
            _take_layers(part, name, part[name])
    for key, value in part.items():
        if isinstance(value, int) and value == hidden and "out" in key:
            part[key] = small_hidden
        elif isinstance(value, list) and "index" in key:
            part[key] = [item for item in value if isinstance(item, int) and item < LEAST_LAYERS] or [0]
    narrow(part, {})


def special_ids(config: Config) -> set[int]:
    """The token ids that a config names, those of configs inside it included."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= special_ids(value)
        elif key.endswith(("token_id", "token_index")):
            found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return found


def _take_layers(config: Config, name: str, count: int) -> None:
    """Keep the first layer of each kind, and two at least. A kind is what the lists with an entry a layer say of it."""
    lists = {key: value for key, value in config.items() if isinstance(value, list) and len(value) == count}
    if count <= LEAST_LAYERS:
        return
    own = {int(index): entries for index, entries in (config.get(_OWN_ENTRIES) or {}).items()}
    kinds: dict[str, int] = {}
    first_sharing = count - (config.get(_SHARING) or 0)
    for index in range(count):
        kind = [*(value[index] for value in lists.values()), own.get(index), index >= first_sharing]
        kinds.setdefault(json.dumps(kind), index)
    kept = sorted({*kinds.values(), *range(LEAST_LAYERS - len(kinds) + 1)})
    config |= {key: [value[index] for index in kept] for key, value in lists.items()}
    config[name] = len(kept)
    if own:
        config[_OWN_ENTRIES] = {str(place): own[index] for place, index in enumerate(kept) if index in own}
    if config.get(_SHARING):
        config[_SHARING] = sum(index >= first_sharing for index in kept)
    if isinstance(config.get(_DENSE_FIRST), int):
        config[_DENSE_FIRST] = min(config[_DENSE_FIRST], 1)


def _narrow_rope(rope: Config, width: int, small_width: int) -> None:
    """Entries that have a number for every frequency, or count frequencies; per kind of layer in some families."""
    for key, value in rope.items():
        if isinstance(value, dict):
            _narrow_rope(value, width, small_width)
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            rope[key] = value[: len(value) * small_width // width]
        elif key == "mrope_section":
            rope[key] = [item * small_width // width for item in value]


def _shorten_vocabulary(config: Config, name: str) -> None:
    """Fewer tokens, and special ones among them."""
    for key in {name, *(key for key in config if key.startswith("vocab_size"))}:
        if isinstance(config.get(key), int):
            config[key] = min(config[key], VOCABULARY)
    free = iter(range(VOCABULARY - 1, 0, -1))
    for key, value in config.items():
        if not key.endswith(("token_id", "token_index")):
            continue
        if isinstance(value, list):
            config[key] = [item if item < VOCABULARY else next(free) for item in value if isinstance(item, int)]
        elif isinstance(value, int) and value >= VOCABULARY:
            config[key] = next(free)
