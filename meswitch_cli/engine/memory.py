"""How much of the device the engine takes, known before anything is loaded."""

from __future__ import annotations

from typing import Any

from meswitch_cli.engine.base_model import BaseModel

#: What the cache of keys and values takes on a CPU unless told otherwise, or one longest request if that is more.
CPU_CACHE_BYTES = 512 << 20


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
