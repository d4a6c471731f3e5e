"""A compression that metadata says can be done, and how it reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch_cli.calibration.data import CalibrationFile
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.config import config_differences
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.model.adapted import AdaptedCheckpoint
from meswitch_cli.model.matching import Plan, PlannedTensor
from meswitch_cli.model.tokenizer import tokenizer_folder, tokenizer_note

#: Called with (what is being done, bytes of the checkpoints handled by it, units done).
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SizeChoice:
    """What a budget gave to each tensor.

    Attributes:
        settings: by name, of the tensors that it chose for.
        expected: for the manifest: nats of KL a token that all errors are expected to cost, and the least that they
            could; the parts of the kinds of projections.
    """

    settings: Mapping[str, QuantizerSettings]
    expected: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """Two checkpoints that belong together, what to do with them, and where the artifact goes.

    Attributes:
        choice: what a budget gave to each tensor.
        form_answer: what `form.choose_form` found, as JSON, kept with unfinished work; None where nothing was asked.
    """

    base: Checkpoint
    expert: Checkpoint
    plan: Plan
    settings: CompressionSettings
    calibration: CalibrationFile | None
    out: Path
    side_files: Mapping[str, bytes]
    choice: SizeChoice | None = None
    remarks: tuple[str, ...] = ()
    form_answer: Mapping[str, Any] | None = None

    def settings_of(self, item: PlannedTensor) -> QuantizerSettings | None:
        """Settings of a tensor, None for one that is stored whole; a budget's must have been chosen."""
        if self.choice is not None and item.name in self.choice.settings:
            return self.choice.settings[item.name]
        return self.settings.of(item.kind, unrelated=item.unrelated)

    @property
    def budget(self) -> int | None:
        """Bytes that the shards may take; None where nobody said."""
        if self.settings.target_bits is not None:
            return int(self.settings.target_bits * sum(math.prod(item.shape) for item in self.plan.tensors) / 8)
        return self.settings.size

    @property
    def nbytes(self) -> int:
        """Bytes of weights that will be read."""
        return self.nbytes_of(self.plan.tensors)

    def nbytes_of(self, items: Iterable[PlannedTensor]) -> int:
        return sum(item.base.info(self.base).nbytes + item.expert.info(self.expert).nbytes for item in items)

    def notes(self) -> list[str]:
        """What is odd about the two checkpoints, and does not keep them from being compressed."""
        tokenizer = tokenizer_note(tokenizer_folder(self.expert.side_folders), self.plan.architecture.vocabulary)
        return list(
            dict.fromkeys([*self.base.notes, *self.expert.notes, *([tokenizer] if tokenizer else []), *self.remarks])
        )

    @property
    def form(self) -> str:
        """What the artifact's model card calls the delta."""
        if self.settings.exact:
            return "an exact delta"
        if self.settings.has_budget:
            return "a delta"
        if isinstance(self.expert, AdaptedCheckpoint):
            return f"a low-rank delta of {self.settings.factor_bits} bits"
        if not self.settings.bits:
            return f"a delta of rank {self.settings.rank}"
        return f"a {self.settings.bits}-bit delta"

    def config_differences(self) -> dict[str, tuple[Any, Any]]:
        return config_differences(self.base.config, self.expert.config)
