"""Making artifacts, and making models of them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.hub.fetch import open_artifact

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from meswitch_cli.artifact.weights import ArtifactWeights


def compress(
    base: str | Path,
    expert: str | Path,
    out: str | Path,
    *,
    calibration: str | Path = "random",
    device: str = "auto",
    force: bool = False,
    keep_weak: bool = False,
    **settings: Any,
) -> Artifact:
    """Compress a fine-tune against its base, as `meswitch compress` does; an interrupted call is gone on with.

    Args:
        base, expert: checkpoint folders or Hub ids.
        out: the artifact's folder.
        calibration: a JSONL file, `random` or `none`.
        device: auto, cpu, cuda or cuda:N.
        force: replace the artifact there.
        keep_weak: write an artifact that is farther from the expert than the base is.
        settings: the command's other options by name, `bits=1` or `rank=16`; those left out have its defaults. Without
            any the expert is stored bit for bit, or as a merged LoRA's products alone, where that is as small as the
            default code.

    Raises:
        MeswitchError: the message says what was wrong, where, and what to do.
    """
    from meswitch_cli.artifact.workspace import require_free
    from meswitch_cli.compression import job
    from meswitch_cli.compression.form import choose_form
    from meswitch_cli.compression.settings import CompressionSettings
    from meswitch_cli.compression.windows import calibration_asked
    from meswitch_cli.model.device import choose_device
    from meswitch_cli.paths import user_path

    data, recorded = calibration_asked(str(calibration))
    options = {"calibration": recorded, **settings}
    out = user_path(out)
    require_free(out, force=force)
    prepared = job.prepare(str(base), str(expert), out, CompressionSettings.with_defaults(**options), data)
    prepared, _ = choose_form(prepared, options)
    job.compress(prepared, device=choose_device(device), force=force, keep_weak=keep_weak)
    return Artifact.open(prepared.out)


def load(
    base: str | Path,
    artifact: Artifact | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "auto",
) -> PreTrainedModel:
    """Base + delta as a transformers model in memory, in evaluation mode, equal to what `restore` writes.

    Every byte of the artifact is checked, and that the base is its base. The model is plain: its weights take as much
    memory as the fine-tune's. To have many experts at once, use `Engine`.

    Args:
        base: checkpoint folder or Hub id.
        artifact: folder, Hub id, or an opened artifact.
        dtype: of the weights; None is the expert's own.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ArtifactError: the artifact is damaged, or was made against another base.
        CheckpointError: the base cannot be read, or a buffer of its family does not follow from its config.
    """
    from meswitch_cli.model.build import build_model
    from meswitch_cli.model.device import choose_device
    from meswitch_cli.model.dtype import DTYPES

    opened = opened_artifact(artifact)
    target = dtype or DTYPES[opened.manifest.dtype]
    model: PreTrainedModel = build_model(expert_weights(base, opened), choose_device(device), target)
    _complete(model, opened, target)
    return model


def expert_weights(base: str | Path, artifact: Artifact) -> ArtifactWeights:
    """An artifact's expert, once the artifact is checked whole and the base has proven to be its own.

    Raises:
        ArtifactError: the artifact is damaged, or was made against another base.
        CheckpointError: the base cannot be read.
    """
    from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
    from meswitch_cli.artifact.weights import ArtifactWeights
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.model.weights import CheckpointWeights

    checkpoint = Checkpoint.open(str(base))
    check_base_shapes(artifact.manifest, checkpoint)
    artifact.check_whole()
    weights = CheckpointWeights(checkpoint)
    refuse_other_base(artifact.manifest, weights.fingerprint, checkpoint.source.path)
    return ArtifactWeights(artifact, weights)


def restore(
    artifact: Artifact | str | Path,
    base: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write base + delta as a checkpoint that `AutoModelForCausalLM` loads; `dtype` None is the expert's own.

    Args:
        artifact: folder, Hub id, or an opened artifact.
        base: checkpoint folder or Hub id.
        out: the checkpoint's folder.
        dtype: of the weights.
        force: replace a checkpoint that is there.

    Raises:
        MeswitchError: the artifact is damaged, the base is another one, or `out` is occupied.
    """
    from meswitch_cli.artifact.restore import restore as write_checkpoint
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.paths import user_path

    opened = opened_artifact(artifact)
    return write_checkpoint(opened, Checkpoint.open(str(base)), user_path(out), dtype=dtype, force=force)


def opened_artifact(artifact: Artifact | str | Path) -> Artifact:
    """The artifact that is given, or the one of this name."""
    return artifact if isinstance(artifact, Artifact) else open_artifact(artifact)


def _complete(model: Any, artifact: Artifact, dtype: torch.dtype) -> None:
    """What `from_pretrained` adds beside the weights: where it is from, its type, how it generates."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    model.name_or_path = model.config.name_or_path = str(artifact.path)
    model.config.dtype = dtype
    if model.can_generate() and (artifact.path / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(artifact.path)
