"""What the expert is calibrated on, as tokens."""

from __future__ import annotations

import torch

from meswitch_cli.calibration.data import random_window, token_windows
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import RANDOM
from meswitch_cli.errors import UsageError
from meswitch_cli.model.tokenizer import load_tokenizer


def calibration_windows(job: Job) -> torch.Tensor:
    """The calibration file as token windows of the expert's own tokenizer, `[n, sequence_length]`; or random tokens.

    Raises:
        CalibrationError: the file cannot be used.
        CheckpointError: the expert has no tokenizer.
        UsageError: the tokenizer gives tokens that the expert has no embedding for.
    """
    vocabulary = job.plan.architecture.vocabulary
    if job.settings.calibration == RANDOM:
        return random_window(vocabulary, job.settings.seed)
    assert job.calibration is not None
    windows = token_windows(
        job.calibration,
        load_tokenizer(job.expert.source.path),
        samples=job.settings.samples,
        sequence_length=job.settings.sequence_length,
        seed=job.settings.seed,
    )
    if int(windows.max()) >= vocabulary:
        raise UsageError(
            f"{job.expert.source.path}: its tokenizer gives token {int(windows.max())}, its embedding has "
            f"{vocabulary} rows; tokenizer and weights do not belong together"
        )
    return windows
