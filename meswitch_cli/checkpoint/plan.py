"""Matching base and expert on metadata alone: what is compressed, kept, new or missing, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meswitch_cli.checkpoint.architecture import ATTENTION_ENTRIES, Architecture, Kind, Parameter, architecture
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.parsed_config import parsed_config
from meswitch_cli.errors import CheckpointError


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the expert beside the base tensor it is taken against.

    `base_name` and `expert_name` are the parameters that hold the values (the embedding where a head is tied to it);
    `base_stored` and `expert_stored` are their names inside the checkpoints. Rows past `shared_rows` exist in the
    expert alone (added vocabulary).
    """

    name: str
    kind: Kind
    layer: int | None
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    base_name: str
    expert_name: str
    base_stored: str
    expert_stored: str

    @property
    def shared_rows(self) -> int:
        return min(self.shape[0], self.base_shape[0]) if self.shape else 0


@dataclass(frozen=True)
class Plan:
    """The work, one list of tensors per unit: the decoder layers in order, then everything else."""

    architecture: Architecture
    units: tuple[tuple[PlannedTensor, ...], ...]

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for unit in self.units for tensor in unit]

    @property
    def added_rows(self) -> int:
        """Vocabulary rows that the expert has and the base has not."""
        return max((item.shape[0] - item.shared_rows for item in self.tensors if item.kind != "dense"), default=0)


def make_plan(base: Checkpoint, expert: Checkpoint) -> Plan:
    """Match two opened checkpoints.

    Raises:
        CheckpointError: the two are not of one architecture and width, or a weight is missing.
    """
    if base.model_type != expert.model_type:
        raise CheckpointError(
            f"base is {base.model_type!r} ({base.source.path}), expert is {expert.model_type!r} "
            f"({expert.source.path}): an expert must be fine-tuned from its base"
        )
    base_model = architecture(base.config, str(base.source.path))
    expert_model = architecture(expert.config, str(expert.source.path))
    _refuse_other_widths(base, expert, base_model, expert_model)
    base_names = base_model.stored_names(base)
    expert_names = expert_model.stored_names(expert)
    units: list[list[PlannedTensor]] = [[] for _ in range(expert_model.num_layers + 1)]
    for name, item in expert_model.parameters.items():
        if item.tied_to and base_model.parameters[name].tied_to:
            continue  # tied in both: the embedding's delta is the head's
        base_item = base_model.parameters[name]
        base_name, expert_name = base_item.tied_to or name, item.tied_to or name
        base_stored, expert_stored = base_names[base_name], expert_names[expert_name]
        _check_stored_shape(expert, expert_stored, item)
        _check_stored_shape(base, base_stored, base_item)
        units[-1 if item.layer is None else item.layer].append(
            PlannedTensor(
                name,
                item.kind,
                item.layer,
                item.shape,
                base_item.shape,
                base_name,
                expert_name,
                base_stored,
                expert_stored,
            )
        )
    return Plan(expert_model, tuple(tuple(unit) for unit in units))


def _check_stored_shape(checkpoint: Checkpoint, stored: str, expected: Parameter) -> None:
    info = checkpoint.tensors[stored]
    if info.shape != expected.shape:
        raise CheckpointError(
            f"{info.path}: tensor {stored!r} is {list(info.shape)}, config.json says {list(expected.shape)}"
        )


def _refuse_other_widths(base: Checkpoint, expert: Checkpoint, ours: Architecture, theirs: Architecture) -> None:
    for name in sorted(set(ours.parameters) | set(theirs.parameters)):
        mine, other = ours.parameters.get(name), theirs.parameters.get(name)
        if mine is None or other is None:
            holder = "expert" if mine is None else "base"
            raise CheckpointError(f"base and expert differ in architecture: only the {holder} has {name!r}")
        vocabulary = mine.kind in ("embedding", "head") or name.startswith("lm_head.")
        same = mine.shape[1:] == other.shape[1:] if vocabulary else mine.shape == other.shape
        if not same:
            raise CheckpointError(
                f"base and expert differ in width: {name!r} is {list(mine.shape)} in {base.source.path}, "
                f"{list(other.shape)} in {expert.source.path}"
            )


def config_differences(base: dict[str, Any], expert: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The config entries that change what the model computes, where expert and base differ (base's, expert's)."""
    ignored = {
        *ATTENTION_ENTRIES, "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vocab_size",
    }  # fmt: skip
    ours, theirs = parsed_config(base), parsed_config(expert)
    keys = (set(ours) | set(theirs)) - ignored
    return {key: (ours.get(key), theirs.get(key)) for key in sorted(keys) if ours.get(key) != theirs.get(key)}
