"""A LoRA adapter on disk, as PEFT saves one: what its tensors are to which module of the base, unread.

Formats and formulas: PEFT 0.21, `LoraConfig` and `tuners/lora/layer.py`. What is not known here is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meswitch_cli.checkpoint.checkpoint import read_json
from meswitch_cli.checkpoint.source import Source
from meswitch_cli.checkpoint.tensorfile import TensorFileError, TensorInfo, read_header
from meswitch_cli.checkpoint.weight_files import ADAPTER_CONFIG, has_weights
from meswitch_cli.errors import CheckpointError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: Entries of adapter_config.json under which the adapter is no sum of its base and a product, whatever their tensors.
_REFUSED = (
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "target_parameters"),
    *("trainable_token_indices", "kasa_config", "megatron_config"),
)
_NAME = r"(?P<module>.+?)\.(?:{})(?:\.default)?"
#: How PEFT calls the tensors of a module, by what they are here.
_PARTS = {
    "left": re.compile(_NAME.format("lora_B") + r"\.weight"),
    "right": re.compile(_NAME.format("lora_A") + r"\.weight"),
    "left_embedding": re.compile(_NAME.format("lora_embedding_A")),
    "right_embedding": re.compile(_NAME.format("lora_embedding_B")),
    "magnitude": re.compile(_NAME.format("lora_magnitude_vector") + r"(\.weight)?"),
    "bias_delta": re.compile(_NAME.format("lora_B") + r"\.bias"),
    "under": re.compile(r"(?P<module>.+)\.base_layer\.weight"),
    "bias": re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.bias"),
    "weight": re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?)?\.weight"),
}
#: Longest regular expression of a pattern's key that is tried.
_LONGEST_PATTERN = 512


@dataclass(frozen=True)
class AdaptedModule:
    """What an adapter holds for one module.

    Attributes:
        scale: of the product of its factors, alpha / r or alpha / sqrt(r).
        parts: tensors by what they are: `left` `[out, r]` and `right` `[r, in]`, or `left_embedding` `[r, vocabulary]`
            and `right_embedding` `[hidden, r]`; DoRA's `magnitude` `[out]`; `bias_delta` `[out]`, to be scaled and
            added; and saved in full `weight`, `bias`, or the weight `under` the product.
    """

    scale: float
    parts: Mapping[str, TensorInfo]

    @property
    def rank(self) -> int:
        """Of its product; 0 where it has none."""
        right, left = self.parts.get("right"), self.parts.get("left_embedding")
        return right.shape[0] if right else left.shape[0] if left else 0


@dataclass(frozen=True)
class Adapter:
    """An adapter whose header has been read.

    Attributes:
        base: what adapter_config.json calls its base; None where it does not say.
        modules: by the module's name in the base's own tree.
        ties: whether PEFT kept tied weights tied (`ensure_weight_tying`).
    """

    source: Source
    base: str | None
    modules: Mapping[str, AdaptedModule]
    ties: bool = False
    file: Path = field(default_factory=Path)

    @classmethod
    def open(cls, source: Source) -> Adapter:
        """Read an adapter's config and header.

        Raises:
            CheckpointError: it is of a kind that is not known, damaged, or only there as pickle.
        """
        config = read_json(source.path / ADAPTER_CONFIG, "an adapter's folder has one")
        _refuse_other_kinds(source.path, config)
        file = source.path / ADAPTER_WEIGHTS
        if not file.is_file():
            pickled = (source.path / "adapter_model.bin").is_file()
            raise CheckpointError(
                f"{source.path}: no {ADAPTER_WEIGHTS}"
                + ("; adapter_model.bin is pickle, which can run code: save the adapter as safetensors" * pickled)
            )
        try:
            tensors = read_header(file)
        except TensorFileError as error:
            raise CheckpointError(str(error)) from error
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in tensors.items():
            part, module = _place(name, file)
            if part in found.setdefault(module, {}):
                raise CheckpointError(f"{file}: holds {module!r} twice, the second time as {name!r}")
            found[module][part] = info
        modules = {name: _module(config, name, parts, file) for name, parts in found.items()}
        told = config.get("base_model_name_or_path")
        base = told if isinstance(told, str) and told else None
        return cls(source, base, modules, bool(config.get("ensure_weight_tying")), file)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model beside it."""
    return (folder / ADAPTER_CONFIG).is_file() and not has_weights(folder)


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder}: an adapter of type {kind!r}; LORA alone is known. Merge it into its base: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)"
        )
    for entry in _REFUSED:
        if config.get(entry):
            raise CheckpointError(
                f"{folder}: {ADAPTER_CONFIG} has {entry} {str(config[entry])[:80]!r}, with which the adapter is more "
                "than a product added to its base; merge it with peft if that can be done"
            )


def _place(name: str, file: Path) -> tuple[str, str]:
    """What a stored tensor is, and of which module."""
    own = name.removeprefix(_PREFIX)
    for part, pattern in _PARTS.items():
        match = pattern.fullmatch(own)
        if match and ".lora_" not in f".{match['module']}" and ".token_adapter" not in own:
            return part, match["module"]
    raise CheckpointError(f"{file}: tensor {name!r} is of no kind that a LoRA is known to have")


def _module(config: Mapping[str, Any], name: str, parts: dict[str, TensorInfo], file: Path) -> AdaptedModule:
    where = f"{file}: {name}"
    for one, other in (("left", "right"), ("left_embedding", "right_embedding")):
        if (one in parts) != (other in parts):
            raise CheckpointError(f"{where}: has one factor of its product and not the other")
    if {"left", "left_embedding"} <= parts.keys() or {"weight", "under"} <= parts.keys():
        raise CheckpointError(f"{where}: is there twice")
    factors = [info for part, info in parts.items() if part.startswith(("left", "right"))]
    if any(len(info.shape) != 2 or not info.numel for info in factors):
        raise CheckpointError(
            f"{where}: a factor is {[list(info.shape) for info in factors]}, not a matrix; were shards of a parallel "
            "training saved without being gathered?"
        )
    if not all(info.dtype.is_floating_point for info in parts.values()):
        raise CheckpointError(f"{where}: holds numbers that are not floating-point")
    if "magnitude" in parts and "left" not in parts:
        raise CheckpointError(f"{where}: DoRA of what is no linear layer; merge it with peft")
    module = AdaptedModule(1.0, parts)
    if not module.rank:
        return module
    rank = _pattern(config, "rank_pattern", name, config.get("r"), where)
    across = parts["left"].shape[1] if "left" in parts else parts["right_embedding"].shape[1]
    if not module.rank == across == rank:
        raise CheckpointError(f"{where}: rank {rank} by {ADAPTER_CONFIG}, its factors have {module.rank} and {across}")
    alpha = _pattern(config, "alpha_pattern", name, config.get("lora_alpha", 8), where)
    return AdaptedModule(alpha / (math.sqrt(module.rank) if config.get("use_rslora") else module.rank), parts)


def _pattern(config: Mapping[str, Any], entry: str, name: str, otherwise: Any, where: str) -> float:
    """A module's number: of the first pattern that its name ends with, else of all."""
    patterns = config.get(entry) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: {entry} is no object")
    value = otherwise
    for pattern, number in patterns.items():
        try:
            if len(pattern) <= _LONGEST_PATTERN and re.match(rf"(.*\.)?({pattern})$", name):
                value = number
                break
        except re.error as error:
            raise CheckpointError(f"{where}: {entry} has {pattern!r}, no regular expression: {error}") from error
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{where}: {entry} gives {value!r}, not a number")
    return value
