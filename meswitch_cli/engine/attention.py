"""Attention over the paged cache on a CPU, one request after the other.

transformers' own implementation without flash kernels masks one product of all queries with all requests' keys, whose
cost grows with the square of the number of requests.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meswitch_cli.engine.modules import kernels
from meswitch_kernels import naive

#: The name under which transformers knows `attend`. It makes no masks for names it has no mask function of.
NAME = "meswitch_by_request"

#: What the batch under way was given, for the decoder layers that do not pass it on to their attention.
_BATCH: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("batch", default=None)


@contextlib.contextmanager
def attending(batch: Mapping[str, Any]) -> Iterator[None]:
    """Have `attend`, in this thread, read and write the cache of a batch, whether or not the model hands it over."""
    token = _BATCH.set(batch)
    try:
        yield
    finally:
        _BATCH.reset(token)


def register() -> str:
    """Make `attend` known to transformers; return its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cache: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention, as transformers calls it: query `[1, heads, tokens, width]` of requests one after another.

    With `cache`, or in a batch that is `attending`, keys and values `[1, key heads, tokens, width]` are stored in the
    cache and those before them are read.

    Returns:
        `[1, tokens, heads, width]`, and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache is None and (batch := _BATCH.get()) is not None:
        cache, kwargs = batch["cache"], {**kwargs, **batch}
    if cache is not None and _is_decode(query, kwargs):
        return _attend_decode(module.layer_idx, query, key, value, scale, cache, softcap, kwargs), None
    if cache is None:
        ends_q, ends_k = [0, query.shape[2]], [0, key.shape[2]]
    else:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    tokens = [end - start for start, end in itertools.pairwise(ends_q)]
    lengths = [end - start for start, end in itertools.pairwise(ends_k)]
    keys, values = torch.split(key, lengths, 2), torch.split(value, lengths, 2)
    results = [
        _attend_one(own, own_keys, own_values, scale, sliding_window, softcap)
        for own, own_keys, own_values in zip(torch.split(query, tokens, 2), keys, values, strict=True)
    ]
    joined = results[0] if len(results) == 1 else torch.cat(results, 2)
    return joined.transpose(1, 2).contiguous(), None


def _is_decode(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether every request of the batch has one query."""
    return bool(query.shape[2] == kwargs["cu_seq_lens_q"].shape[0] - 1)


def _attend_decode(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    cache: Any,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """One query of each request, whose keys are read where they lie in the cache, whatever window it keeps."""
    allocator = cache.layer_to_allocator[layer]
    key_cache, value_cache = allocator._kv_token_views[layer]
    if query.shape[3] != key.shape[3] or (key[0, :, 0].shape, value[0, :, 0].shape) != (
        key_cache.shape[1:],
        value_cache.shape[1:],
    ):  # kernels do not look
        raise ValueError(f"keys {list(key.shape)} and values {list(value.shape)} do not fit the cache")
    backend = kernels(query.device, query.dtype)
    result: Tensor = getattr(backend, "decode_attention", naive.decode_attention)(
        query[0],
        key[0],
        value[0],
        key_cache,
        value_cache,
        kwargs["read_index"][allocator.index],
        kwargs["cu_seq_lens_k"][allocator.layer_type],
        kwargs["write_index"][allocator.index],
        kwargs["max_length_k"][allocator.layer_type],
        scale,
        softcap,
    )
    return result.unsqueeze(0)


def _attend_one(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """One request, whose last key is its last query's."""
    heads, tokens = query.shape[1], query.shape[2]
    length = key.shape[2]
    windowed = window is not None and length > window
    mask = _mask(tokens, length, window, query.device) if windowed or 1 < tokens < length or softcap else None
    if softcap:
        return _capped(query, key, value, scale, mask, softcap)
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        scale=scale,
        enable_gqa=heads != key.shape[1],
    )


def _mask(tokens: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """True `[tokens, length]` where a query may look: not ahead, nor further back than the window."""
    distance = torch.arange(length - tokens, length, device=device)[:, None] - torch.arange(length, device=device)
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _capped(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, cap: float) -> Tensor:
    """Attention whose scores are squashed to +-cap, as Gemma 2's."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype) @ value
