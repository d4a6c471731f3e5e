"""What an expert's linears are given: calibration data, and the statistics taken over it."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.calibration.data import CalibrationFile, random_window, read_calibration, token_windows
    from meswitch_cli.calibration.stream import stream_statistics

__all__ = ["CalibrationFile", "random_window", "read_calibration", "stream_statistics", "token_windows"]

__getattr__ = exporter(
    __name__,
    {
        "CalibrationFile": "data",
        "random_window": "data",
        "read_calibration": "data",
        "token_windows": "data",
        "stream_statistics": "stream",
    },
)
