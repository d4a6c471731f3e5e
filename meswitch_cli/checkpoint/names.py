"""Stored names and the names of a model's parameters: transformers' own renaming, and why names do not match."""

from __future__ import annotations

import re
from collections.abc import Collection, Container

#: Names that transformers renames when it loads an older checkpoint, and that we rename likewise.
_RENAMED = ((re.compile(r"^embed_out\."), "lm_head."),)
#: Parts of a name that a wrapper put there and that saving the wrapped model inside would not have: torch.compile,
#: DDP, FSDP, activation checkpointing, PEFT.
_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "a parallel wrapper",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model": "PEFT",
    "base_layer": "PEFT, before its adapter is merged",
}
_ADAPTER = re.compile(r"\.lora_[A-Za-z_]+(\.|$)")


def canonical_name(name: str, known: Container[str], base_prefix: str) -> str:
    """The name by which the model knows a stored tensor: the base model's prefix is taken off or put on where that
    makes it known, as transformers does when it loads.
    """
    if name in known:
        return name
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    without = name.removeprefix(f"{base_prefix}.")
    if name not in known and without in known:
        return without
    return f"{base_prefix}.{name}" if f"{base_prefix}.{name}" in known else name


def explain_names(unknown: Collection[str], known: Container[str], base_prefix: str) -> str | None:
    """Why names do not belong to a model, where that can be told from them; else None."""
    adapters = [name for name in unknown if _ADAPTER.search(name)]
    if adapters:
        return (
            f"{adapters[0]!r} is of a LoRA adapter that was never merged: merge_and_unload() it, then save_pretrained"
        )
    wrappers = sorted({part for name in unknown for part in name.split(".") if part in _WRAPPERS})
    if wrappers and all(_is_known(_unwrapped(name), known, base_prefix) for name in unknown):
        causes = " and ".join(f"{part!r} ({_WRAPPERS[part]})" for part in wrappers)
        return f"the names hold {causes}: save the model inside the wrapper; transformers does not load these either"
    prefix = _common_prefix(unknown, known, base_prefix)
    if prefix:
        return (
            f"the names begin with the prefix {prefix!r}, which is not the model's: save the model without what is "
            "around it; transformers does not load these either"
        )
    return None


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_known(name: str, known: Container[str], base_prefix: str) -> bool:
    # PEFT wraps as base_model.model: what is left then begins with one `model.` more.
    candidates = (name, name.removeprefix("model."))
    return any(canonical_name(item, known, base_prefix) in known for item in candidates)


def _common_prefix(unknown: Collection[str], known: Container[str], base_prefix: str) -> str | None:
    """The shortest beginning, `a.` or `a.b.`, without which all names that have it are known, and most have it."""
    first = next(iter(unknown), "").split(".")
    for length in range(1, len(first)):
        prefix = ".".join(first[:length]) + "."
        having = [name for name in unknown if name.startswith(prefix)]
        inside = [name.removeprefix(prefix) for name in having]
        if 2 * len(having) > len(unknown) and all(canonical_name(name, known, base_prefix) in known for name in inside):
            return prefix
    return None
