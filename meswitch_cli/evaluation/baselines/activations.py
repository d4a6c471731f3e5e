"""What an expert's linears are given: the statistics that methods calibrate on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from meswitch_cli.calibration.data import random_window, read_calibration, token_windows
from meswitch_cli.calibration.stream import calibration_dtype, stream_statistics
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.evaluation.subjects import Expert
from meswitch_cli.model.dtype import stored_dtype

#: Windows and tokens of calibration data that statistics are taken over.
SAMPLES, SEQUENCE_LENGTH = 32, 512

#: `auto` is the file where there is one, else random tokens.
ActivationSource = Literal["auto", "file", "random", "none"]


class Activations:
    """An expert's input statistics, over a calibration file or over random tokens, taken when first asked for."""

    def __init__(self, expert: Expert, path: Path | None, seed: int = 0, samples: int = SAMPLES) -> None:
        self.expert, self.path, self.seed, self.samples = expert, path, seed, samples
        self._known: dict[tuple[str, bool], Mapping[str, InputStatistics]] = {}

    def windows(self) -> torch.Tensor:
        """The calibration file as token windows `[n, length]`.

        Raises:
            CalibrationError: the file cannot be used.
        """
        assert self.path is not None
        return token_windows(
            read_calibration(self.path),
            self.expert.tokenizer,
            samples=self.samples,
            sequence_length=SEQUENCE_LENGTH,
            seed=self.seed,
        )

    def statistics(self, source: str, *, gram: bool = False) -> Mapping[str, InputStatistics]:
        """Statistics by parameter name; `source` is `file`, `random`, `none`, or `auto`: the file where there is one.

        Raises:
            CalibrationError: the file cannot be used.
        """
        if source == "auto":
            source = "file" if self.is_data(source) else "random"
        if source == "none":
            return {}
        if (source, gram) not in self._known:
            self._known[source, gram] = self.measure(source, gram=gram)
        return self._known[source, gram]

    def is_data(self, source: str) -> bool:
        """Whether this source is the calibration file."""
        return source == "file" or (source == "auto" and self.path is not None)

    def measure(self, source: str, *, gram: bool) -> Mapping[str, InputStatistics]:
        """Run the expert over the file's windows, or over the random tokens that `meswitch compress` would use."""
        weights, random = self.expert.weights, source == "random"
        found: dict[str, InputStatistics] = {}
        for _, statistics in stream_statistics(
            weights,
            random_window(weights.architecture.vocabulary, self.seed) if random else self.windows(),
            gram=gram,
            keep=random,
            dtype=calibration_dtype(stored_dtype(weights.checkpoint), "cpu", few_tokens=random),
        ):
            found |= statistics
        return found
