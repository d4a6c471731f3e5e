"""A config.json as transformers reads it: with its defaults, and in its present spelling."""

from __future__ import annotations

import json
from typing import Any


def parsed_config(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of the config that transformers makes of a config.json, so that two spellings of one thing (the
    rope of transformers 4 and 5, say) come out alike; the entries themselves where transformers cannot read them.
    """
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        parsed: dict[str, Any] = json.loads(AutoConfig.for_model(**plain).to_json_string(use_diff=False))
    except Exception:  # transformers raises many kinds for a config that it cannot use
        return plain
    return parsed
