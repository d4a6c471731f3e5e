"""Matching base and expert on metadata alone: what is compressed, kept, new or missing, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.architecture import Architecture, Kind, Storage, architecture


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the expert beside the base tensor it is taken against.

    `base` and `expert` say which parameters hold the values (the embedding where a head is tied to it), and where the
    checkpoints have them.
    """

    name: str
    kind: Kind
    layer: int | None
    base: Storage
    expert: Storage

    @property
    def shape(self) -> tuple[int, ...]:
        return self.expert.parameter.shape

    @property
    def base_shape(self) -> tuple[int, ...]:
        return self.base.parameter.shape

    @property
    def stacked(self) -> bool:
        """Whether this is one of many matrices that a model holds as one parameter: an expert's of a mixture."""
        return self.expert.parameter.stacked

    @property
    def unrelated(self) -> bool:
        """Whether this is an untied head against a base that ties its own: the two may have nothing in common."""
        return self.kind == "head" and self.base.parameter.name != self.name

    @property
    def shared_rows(self) -> int:
        """Rows that both have; further ones are the expert's alone (added vocabulary)."""
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
    def has_head(self) -> bool:
        """Whether the expert has a head of its own, which is not its embedding."""
        return any(item.kind == "head" for item in self.tensors)

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
    stored, expert_stored = base_model.stored(base), expert_model.stored(expert)
    units: list[list[PlannedTensor]] = [[] for _ in range(expert_model.num_layers + 1)]
    for name, item in expert_model.parameters.items():
        if item.tied_to and base_model.parameters[name].tied_to:
            continue  # tied in both: the embedding's delta is the head's
        ours, theirs = stored[base_model.holder(name).name], expert_stored[expert_model.holder(name).name]
        _check_stored_shape(expert, theirs)
        _check_stored_shape(base, ours)
        units[-1 if item.layer is None else item.layer].append(
            PlannedTensor(name=name, kind=item.kind, layer=item.layer, base=ours, expert=theirs)
        )
    return Plan(expert_model, tuple(tuple(unit) for unit in units))


def _check_stored_shape(checkpoint: Checkpoint, storage: Storage) -> None:
    info = checkpoint.tensors[storage.name]
    if info.shape != storage.shape:
        raise CheckpointError(
            f"{info.path}: tensor {info.name!r} is {list(info.shape)}, config.json says {list(storage.shape)}"
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
