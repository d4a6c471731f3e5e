"""`meswitch compress` as a whole: settings, a job, and doing it."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.compression.job import compress, prepare
    from meswitch_cli.compression.plan import Job
    from meswitch_cli.compression.settings import CompressionSettings

__all__ = ["CompressionSettings", "Job", "compress", "prepare"]

__getattr__ = exporter(
    __name__, {"compress": "job", "prepare": "job", "Job": "plan", "CompressionSettings": "settings"}
)
