"""What a method asks of an expert's inputs, taken once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.subjects import Expert

CALIBRATION_WINDOWS = 32


class StoredActivations(Activations):
    """Statistics kept on disk between runs: taking them costs more than a row."""

    def __init__(self, expert: Expert, path: Path, folder: Path) -> None:
        super().__init__(expert, path, samples=CALIBRATION_WINDOWS)
        self._folder = folder

    def measure(self, source: str, *, gram: bool) -> Mapping[str, InputStatistics]:
        file = self._folder / f"{self.expert.label}-{source}-{'gram' if gram else 'energy'}.safetensors"
        if not file.exists():
            parts = {}
            for name, item in super().measure(source, gram=gram).items():
                parts |= {f"{name}|energy": item.energy, f"{name}|tokens": torch.tensor([item.tokens])}
                if item.inputs is not None:
                    parts[f"{name}|inputs"] = item.inputs.clone()
                if item.gram is not None:
                    parts[f"{name}|gram"] = item.gram.clone()  # projections of one input share theirs
            safetensors.torch.save_file(parts, file)
        stored = safetensors.torch.load_file(file)
        names = {key.partition("|")[0] for key in stored}
        return {
            name: InputStatistics(
                stored[f"{name}|energy"],
                stored.get(f"{name}|gram"),
                int(stored[f"{name}|tokens"]),
                stored.get(f"{name}|inputs"),
            )
            for name in names
        }
