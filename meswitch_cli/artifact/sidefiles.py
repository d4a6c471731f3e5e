"""The files beside the shards: config, tokenizer and templates taken from the expert, and a model card."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from meswitch_cli.errors import CheckpointError

MODEL_CARD = "README.md"
CONFIG_FILE = "config.json"
EXPERT_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
#: Entries that may name a path of the author's machine, or code to run.
_PRIVATE_KEYS = ("_name_or_path", "name_or_path", "auto_map")


def expert_files(folder: Path) -> dict[str, bytes]:
    """Read the expert's files, free of local paths and of code references.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files: dict[str, bytes] = {}
    for name in EXPERT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        files[name] = _without_private_keys(data) if name.endswith("config.json") else data
    return files


def _without_private_keys(data: bytes) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return data
    if not isinstance(value, dict) or not any(key in value for key in _PRIVATE_KEYS):
        return data
    kept = {key: item for key, item in value.items() if key not in _PRIVATE_KEYS}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(
    *, base_id: str, expert_id: str, bits: int, nbytes: int, expert_nbytes: int, facts: dict[str, Any]
) -> bytes:
    """A Hub model card that says what the artifact is and how to use it."""
    settings = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    return f"""---
library_name: meswitch
base_model: {json.dumps(base_id, ensure_ascii=False)}
base_model_relation: quantized
tags:
- meswitch
- delta-compression
---

# {expert_id}, as a {bits}-bit delta against {base_id}

{nbytes / 1e6:.1f} MB instead of {expert_nbytes / 1e6:.1f} MB ({expert_nbytes / max(nbytes, 1):.1f} times smaller).
It needs the base to run: every number of the fine-tune is the base's plus what is stored here.

```
meswitch verify . --base {shlex.quote(base_id)}
meswitch restore . --base {shlex.quote(base_id)} --out restored
```

| setting | value |
|---|---|
{settings}
""".encode()
