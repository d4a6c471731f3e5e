"""What a folder is that was given for an artifact and is none."""

from __future__ import annotations

from pathlib import Path

from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.checkpoint.weight_files import ADAPTER_CONFIG, has_weights

ROUTER_FILE = "router.json"
_GGUF = "*.gguf"
_NAMED = 3


def what_it_is(path: Path) -> str:
    """What lies there in an artifact's place, and what to do about it; file names alone are looked at."""
    compress = f"compress it: meswitch compress --base BASE --expert {path} --out NEW_FOLDER"
    if path.suffix == ".gguf" or (path.is_dir() and not has_weights(path) and any(path.glob(_GGUF))):
        return "GGUF, which meswitch does not read; compress the safetensors checkpoint that it was made from"
    if path.is_file():
        return "a file; give the folder that holds meswitch.json"
    if not path.exists():
        unfinished = path.parent / f".{path.name}.partial"
        if unfinished.is_dir():
            return "its compression is not finished; run the same `meswitch compress` again, and it goes on"
        return "there is no such folder"
    if (path / ROUTER_FILE).is_file():
        return "a router; give it as --router"
    if (path / ADAPTER_CONFIG).is_file():
        return f"an adapter, such as a LoRA; {compress}"
    if has_weights(path):
        return f"a whole checkpoint; {compress}"
    inside = sorted(file.parent.name for file in path.glob(f"*/{MANIFEST_FILE}"))
    if inside:
        more = f" and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
        return f"a folder of artifacts ({', '.join(inside[:_NAMED])}{more}); give one of them"
    return f"it has no {MANIFEST_FILE}"
