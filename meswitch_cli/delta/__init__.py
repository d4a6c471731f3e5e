"""Deltas as tensors: to codes and back. No files."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.delta.quantize import dequantize
    from meswitch_cli.delta.settings import QuantizerSettings
    from meswitch_cli.delta.stored import StoredDelta, TensorEntry

__all__ = ["QuantizerSettings", "StoredDelta", "TensorEntry", "dequantize"]

__getattr__ = exporter(
    __name__,
    {
        "dequantize": "quantize",
        "QuantizerSettings": "settings",
        "StoredDelta": "stored",
        "TensorEntry": "stored",
    },
)
