"""What a program calls: compressing and restoring with the commands' own defaults, without their output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch_cli.artifact.artifact import Artifact

if TYPE_CHECKING:
    import torch


def compress(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    calibration: str | Path = "random",
    device: str = "auto",
    force: bool = False,
    **settings: Any,
) -> Artifact:
    """Compress a fine-tune against its base, as `meswitch compress` does; an interrupted call is gone on with.

    Args:
        base, expert: checkpoint folders or Hub ids.
        out: the artifact's folder.
        calibration: a JSONL file, `random` or `none`.
        device: auto, cpu, cuda or cuda:N.
        force: replace the artifact there.
        settings: the command's other options by name, `bits=1` or `rank=16`; those left out have its defaults.

    Raises:
        MeswitchError: the message says what was wrong, where, and what to do.
    """
    from meswitch_cli.compression import job
    from meswitch_cli.compression.settings import CompressionSettings
    from meswitch_cli.compression.windows import calibration_asked
    from meswitch_cli.model.device import choose_device
    from meswitch_cli.paths import user_path

    data, recorded = calibration_asked(str(calibration))
    chosen = CompressionSettings.with_defaults(calibration=recorded, **settings)
    prepared = job.prepare(str(base), str(expert), user_path(str(out)), chosen, data)
    job.compress(prepared, device=choose_device(device), force=force)
    return Artifact.open(prepared.out)


def restore(
    artifact: Artifact | str | Path,
    base: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write base + delta as a checkpoint that `AutoModelForCausalLM` loads; `dtype` None is the expert's own.

    Raises:
        MeswitchError: the artifact is damaged, the base is another one, or `out` is occupied.
    """
    from meswitch_cli.artifact.restore import restore as write_checkpoint
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.paths import user_path

    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(user_path(str(artifact)))
    return write_checkpoint(opened, Checkpoint.open(str(base)), user_path(str(out)), dtype=dtype, force=force)
