"""What the expert is calibrated on: what was asked for, and as tokens."""

from __future__ import annotations

import torch

from meswitch_cli.calibration.data import CalibrationFile, random_window, read_calibration, token_windows
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import RANDOM
from meswitch_cli.errors import UsageError
from meswitch_cli.model.tokenizer import load_tokenizer, tokenizer_folder
from meswitch_cli.paths import user_path


def calibration_asked(asked: str) -> tuple[CalibrationFile | None, str | None]:
    """The file that `--calibration` names, if it names one, and what the settings record of it.

    Raises:
        CalibrationError: the file cannot be used.
    """
    if asked in (RANDOM, "none"):
        return None, RANDOM if asked == RANDOM else None
    data = read_calibration(user_path(asked))
    return data, data.sha256


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
        load_tokenizer(tokenizer_folder(job.expert.side_folders)),
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
