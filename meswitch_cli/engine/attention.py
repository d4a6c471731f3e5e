"""Attention over the paged cache. On a GPU one kernel reads the pages of all requests that have one new token, another
those of the others; on a CPU, prompts are read one after the other.

transformers' own implementation without flash kernels masks one product of all queries with all requests' keys, whose
cost grows with the square of the number of requests.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from meswitch_cli.engine.modules import kernels
from meswitch_kernels import naive

if TYPE_CHECKING:
    from meswitch_cli.engine.inputs import BatchLayout

#: The name under which transformers knows `attend`. It makes no masks for names it has no mask function of.
NAME = "meswitch_by_request"

#: What the batch under way was given, for the decoder layers that do not pass it on to their attention, and its layout.
_BATCH: contextvars.ContextVar[tuple[Mapping[str, Any], BatchLayout | None] | None]
_BATCH = contextvars.ContextVar("batch", default=None)


@contextlib.contextmanager
def attending(batch: Mapping[str, Any], layout: BatchLayout | None = None) -> Iterator[None]:
    """Have `attend`, in this thread, read and write the cache of a batch, whether or not the model hands it over."""
    token = _BATCH.set((batch, layout))
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
    given, layout = _BATCH.get() or (None, None)
    if cache is None and given is not None:
        cache, kwargs = given["cache"], {**kwargs, **given}
    if cache is None:
        return _by_token(_attend_one(query, key, value, scale, sliding_window, softcap)), None
    layer = _Layer(module.layer_idx, cache, scale, sliding_window, softcap)
    if layout is None and kwargs.get("block_table") is None:
        way = _attend_decode if _is_decode(query, kwargs) else _attend_prompts
        return way(layer, query, key, value, kwargs), None
    positions = (given or kwargs)["position_ids"][0]
    if layout is None:
        return _attend_pages(layer, query, key, value, kwargs["block_table"], positions), None
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    alone = len(layout.singles)
    if alone:
        tables = layout.tables[:, :alone]
        _attend_pages(layer, query, key, value, tables, positions, layout.singles, out[0])
    if layout.counts:
        allocator = layer.allocator
        backend = kernels(query.device, query.dtype)
        getattr(backend, "prompt_attention", naive.prompt_attention)(
            query[0],
            key[0],
            value[0],
            *layer.cached(query, key, value),
            layout.tables[allocator.index],
            layout.prompts,
            layout.counts,
            allocator.tokens_per_page,
            layer.scale,
            out[0],
            window=getattr(allocator, "sliding_window", None),
            softcap=softcap,
        )
    return out, None


class _Layer(NamedTuple):
    """What a layer attends with."""

    number: int
    cache: Any
    scale: float
    window: int | None
    softcap: float | None

    @property
    def allocator(self) -> Any:
        """Of its kind's pages in the cache."""
        return self.cache.layer_to_allocator[self.number]

    def cached(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's keys and values.

        Raises:
            ValueError: new ones are of another shape; kernels do not look.
        """
        key_cache: Tensor
        value_cache: Tensor
        key_cache, value_cache = self.allocator._kv_token_views[self.number]
        if query.shape[3] != key.shape[3] or (key[0, :, 0].shape, value[0, :, 0].shape) != (
            key_cache.shape[1:],
            value_cache.shape[1:],
        ):
            raise ValueError(f"keys {list(key.shape)} and values {list(value.shape)} do not fit the cache")
        return key_cache, value_cache


def _by_token(result: Tensor) -> Tensor:
    """`[1, tokens, heads, width]` of `[1, heads, tokens, width]`."""
    return result.transpose(1, 2).contiguous()


def _is_decode(query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether every request of the batch has one query."""
    return bool(query.shape[2] == kwargs["cu_seq_lens_q"].shape[0] - 1)


def _attend_prompts(layer: _Layer, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Requests of several tokens each, one after the other, over keys gathered from the cache."""
    key, value = layer.cache.update(key_states=key, value_states=value, layer_idx=layer.number, kwargs=kwargs)
    ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    tokens, lengths = ([last - first for first, last in itertools.pairwise(ends)] for ends in (ends_q, ends_k))
    keys, values = torch.split(key, lengths, 2), torch.split(value, lengths, 2)
    results = [
        _attend_one(own, own_keys, own_values, layer.scale, layer.window, layer.softcap)
        for own, own_keys, own_values in zip(torch.split(query, tokens, 2), keys, values, strict=True)
    ]
    return _by_token(results[0] if len(results) == 1 else torch.cat(results, 2))


def _attend_pages(
    layer: _Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    positions: Tensor,
    singles: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One query of each request, whose pages are in its table."""
    allocator = layer.allocator
    backend = kernels(query.device, query.dtype)
    result: Tensor = getattr(backend, "paged_attention", naive.paged_attention)(
        query[0],
        key[0],
        value[0],
        *layer.cached(query, key, value),
        tables[allocator.index],
        positions,
        allocator.tokens_per_page,
        layer.scale,
        window=getattr(allocator, "sliding_window", None),
        softcap=layer.softcap,
        tokens=singles,
        out=out,
    )
    return result.unsqueeze(0)


def _attend_decode(layer: _Layer, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One query of each request, whose keys are listed row by row, whatever window the cache keeps."""
    allocator = layer.allocator
    backend = kernels(query.device, query.dtype)
    result: Tensor = getattr(backend, "decode_attention", naive.decode_attention)(
        query[0],
        key[0],
        value[0],
        *layer.cached(query, key, value),
        kwargs["read_index"][allocator.index],
        kwargs["cu_seq_lens_k"][allocator.layer_type],
        kwargs["write_index"][allocator.index],
        kwargs["max_length_k"][allocator.layer_type],
        layer.scale,
        layer.softcap,
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
