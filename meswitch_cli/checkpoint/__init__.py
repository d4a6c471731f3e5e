"""Hugging Face checkpoints, read lazily: which files and tensors one consists of, as transformers loads it."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.checkpoint.checkpoint import Checkpoint

__all__ = ["Checkpoint"]

__getattr__ = exporter(__name__, {"Checkpoint": "checkpoint"})
