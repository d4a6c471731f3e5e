"""config.json as transformers reads it, and what of it makes two models compute differently."""

from __future__ import annotations

import copy
import json
from typing import Any

#: Entries that would name code of the checkpoint's, speak of how it was stored, or choose an attention kernel, which
#: is the machine's affair and may not be installed here.
_NOT_THE_MODELS = frozenset((
    "auto_map", "quantization_config", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
))  # fmt: skip

#: Entries that do not change what the layers compute.
_HARMLESS = frozenset((
    "_name_or_path", "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_implementation",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task",
    "hidden_dropout", "id2label", "initializer_range", "label2id", "max_position_embeddings", "pad_token_id",
    "pretraining_tp", "problem_type", "resid_pdrop", "sep_token_id", "task_specific_params", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache", "vocab_size",
))  # fmt: skip


def parsed_config(config: dict[str, Any]) -> Any:
    """The transformers configuration that the content of a config.json describes; runs no code of the checkpoint's.

    Raises:
        Exception: of many kinds, where transformers does not know the model or cannot use an entry.
    """
    from transformers import AutoConfig

    if not config.get("model_type"):
        raise ValueError("config.json names no model_type")
    return AutoConfig.for_model(**_own(config))


def _own(config: dict[str, Any]) -> dict[str, Any]:
    """A copy without the entries that are not the model's, those of its parts included, numbers as numbers."""
    return {key: _entry(value) for key, value in config.items() if key not in _NOT_THE_MODELS}


def _entry(value: Any) -> Any:
    if isinstance(value, dict):
        return _number(value) if value.keys() == {"__float__"} else _own(value)
    return [_entry(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def config_differences(base: dict[str, Any], expert: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The entries that make two models compute differently, as (base's, expert's).

    Both are compared as transformers reads them, defaults filled in: two spellings of one thing are no difference.
    """
    ours, theirs = _entries(base), _entries(expert)
    keys = (set(ours) | set(theirs)) - _HARMLESS
    return {key: (ours.get(key), theirs.get(key)) for key in sorted(keys) if ours.get(key) != theirs.get(key)}


def _entries(config: dict[str, Any]) -> dict[str, Any]:
    """Every entry as transformers reads it."""
    entries: dict[str, Any] = json.loads(parsed_config(config).to_json_string(use_diff=False), object_hook=_number)
    return entries


def _number(value: dict[str, Any]) -> Any:
    """transformers writes what JSON has no number for as `{"__float__": "Infinity"}`."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value
