"""How an artifact's config.json tells transformers what it is; `library/quantizer.py` is what it then calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: The entry that transformers looks at, the method that it looks up, and the entry that names the base.
QUANTIZATION, QUANT_METHOD, BASE_ENTRY = "quantization_config", "meswitch", "meswitch_base"


def for_transformers(config: bytes, base: str, weights: str) -> bytes:
    """An artifact's config.json: the expert's, and what transformers needs to load the artifact itself.

    Args:
        config: the expert's.
        base: folder or Hub id of the base.
        weights: a shard's name.
    """
    value = json.loads(config) | {BASE_ENTRY: base, QUANTIZATION: {"quant_method": QUANT_METHOD, "weights": weights}}
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def without_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The expert's config alone."""
    return {key: value for key, value in config.items() if key not in (BASE_ENTRY, QUANTIZATION)}
