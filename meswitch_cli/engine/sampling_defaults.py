"""What a model's own generation_config.json sets of its sampling."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meswitch_cli.checkpoint.json_file import read_json
from meswitch_cli.engine.sampling_ranges import RANGES

#: Members that transformers calls by the same names, and means the same by.
_SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

logger = logging.getLogger(__name__)


def sampling_defaults(folder: Path) -> Mapping[str, float]:
    """Members of `contract.Sampling` by name, for a model in a folder.

    `do_sample: false` is a temperature of 0. A value outside of its range is left out, with a warning in the log.

    Raises:
        CheckpointError: the file is there and is not JSON.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return {}
    config = read_json(file, "")
    set_here = {name: config[name] for name in _SAME if config.get(name) is not None}
    if config.get("do_sample") is False:
        set_here["temperature"] = 0.0
    for name, value in set_here.items():
        if not _can_be(name, value):
            logger.warning("%s: %s is %r, which cannot be: it is not used", file, name, value)
    return {name: value for name, value in set_here.items() if _can_be(name, value)}


def _can_be(name: str, value: Any) -> bool:
    kinds = (int,) if name == "top_k" else (int, float)
    return type(value) in kinds and RANGES[name].holds(value)
