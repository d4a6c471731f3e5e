"""Hugging Face checkpoints, read lazily: which files and tensors one consists of, as transformers loads it."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.checkpoint.skeleton import skeleton

__all__ = ["Checkpoint", "skeleton"]

__getattr__ = exporter(__name__, {"Checkpoint": "checkpoint", "skeleton": "skeleton"})
