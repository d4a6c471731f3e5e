"""The config of a small model that computes as a large one does: each kind of layer, few of each, all narrow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from meswitch_cli.model.config import parsed_config

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
#: How many layers come before those with a mixture of experts.
_DENSE_FIRST = "first_k_dense_replace"
#: What differs in single layers, by their index.
_OWN_ENTRIES = "per_layer_config"

Config = dict[str, Any]


def small_configs(config: Config) -> Iterator[Config]:
    """Configs of small models of the same class, the smallest first; transformers may be unable to build some.

    Heads stay grouped, shared or apart, and the hidden states as wide as the heads together or not. The later ones
    shrink less: vocabulary, layers and the MLPs' width, and then vocabulary and layers alone.

    Raises:
        Exception: of many kinds, where transformers cannot read the config.
    """
    described = parsed_config(config)
    full: Config = json.loads(described.to_json_string(use_diff=False))
    text = described.get_text_config()
    place = next((key for key, value in vars(described).items() if value is text and value is not described), None)
    for narrow in (_narrowed, _with_short_mlps, None):
        small: Config = json.loads(json.dumps({key: value for key, value in full.items() if key[0] != "_"}))
        inner = small if place is None else small[place]
        names = {key: type(text).attribute_map.get(key, key) for key in ("num_hidden_layers", "vocab_size")}
        _take_layers(inner, names["num_hidden_layers"], int(text.num_hidden_layers))
        if narrow is not None:
            narrow(inner, type(text).attribute_map)
        for level in (small, inner):
            _shorten_vocabulary(level, names["vocab_size"])
        yield small


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
    for index in range(count):
        kinds.setdefault(json.dumps([*(value[index] for value in lists.values()), own.get(index)]), index)
    kept = sorted({*kinds.values(), *range(LEAST_LAYERS - len(kinds) + 1)})
    config |= {key: [value[index] for index in kept] for key, value in lists.items()}
    config[name] = len(kept)
    if own:
        config[_OWN_ENTRIES] = {str(place): own[index] for place, index in enumerate(kept) if index in own}
    if isinstance(config.get(_DENSE_FIRST), int):
        config[_DENSE_FIRST] = min(config[_DENSE_FIRST], 1)


def _narrowed(config: Config, names: Mapping[str, str]) -> None:
    """Few narrow heads, and all that is as wide as the hidden states likewise; `names` are the family's own."""
    _with_short_mlps(config, names)
    hidden, heads, shared, width = (
        config.get(names.get(key, key))
        for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return
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
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(config.get(key), dict):
            _narrow_rope(config[key], width, small_width)


def _narrow_rope(rope: Config, width: int, small_width: int) -> None:
    """Entries that have a number for every frequency, or count frequencies; per kind of layer in some families."""
    for key, value in rope.items():
        if isinstance(value, dict):
            _narrow_rope(value, width, small_width)
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            rope[key] = value[: len(value) * small_width // width]
        elif key == "mrope_section":
            rope[key] = [item * small_width // width for item in value]


def _with_short_mlps(config: Config, names: Mapping[str, str]) -> None:
    for key, value in config.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if value > INTERMEDIATE and ("intermediate" in key or "ffn" in key or key == "n_inner"):
            config[key] = INTERMEDIATE
        elif key == "sliding_window":
            config[key] = min(value, WINDOW)


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
