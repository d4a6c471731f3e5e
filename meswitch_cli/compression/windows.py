"""What the expert is calibrated on: what was asked for, and as tokens."""

from __future__ import annotations

from typing import Any

import torch

from meswitch_cli.calibration.data import CalibrationFile, random_window, read_calibration, token_windows
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import RANDOM
from meswitch_cli.errors import UsageError
from meswitch_cli.model.architecture import Architecture
from meswitch_cli.model.tokenizer import load_tokenizer, tokenizer_folder
from meswitch_cli.paths import user_path

#: What families call the number of experts that a token goes to.
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
#: The most windows of random tokens; a mixture of 256 experts of which 8 are chosen has as many.
MOST_WINDOWS = 32


def calibration_asked(asked: str) -> tuple[CalibrationFile | None, str | None]:
    """The file that `--calibration` names, if it names one, and what the settings record of it.

    Raises:
        CalibrationError: the file cannot be used.
    """
    if asked in (RANDOM, "none"):
        return None, RANDOM if asked == RANDOM else None
    data = read_calibration(user_path(asked))
    return data, data.sha256


def random_windows(described: Architecture, config: dict[str, Any]) -> int:
    """Windows of random tokens by which each expert of a mixture would see a window's tokens, if they came evenly."""
    text = config.get("text_config") or config
    chosen = next((text[key] for key in CHOSEN_EXPERTS if isinstance(text.get(key), int) and text[key] > 0), 1)
    return min(MOST_WINDOWS, max(1, -(-described.experts // chosen)))


def calibration_windows(job: Job) -> torch.Tensor:
    """The calibration file as token windows of the expert's own tokenizer, `[n, sequence_length]`; or random tokens.

    Raises:
        CalibrationError: the file cannot be used.
        CheckpointError: the expert has no tokenizer.
        UsageError: the tokenizer gives tokens that the expert has no embedding for.
    """
    vocabulary = job.plan.architecture.vocabulary
    if job.settings.calibration == RANDOM:
        count = random_windows(job.plan.architecture, job.expert.config)
        return torch.cat([random_window(vocabulary, job.settings.seed + index) for index in range(count)])
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
