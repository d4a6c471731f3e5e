"""What an artifact is expected to take, before a weight is read, against what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.compression.size import expected_bytes
from zoo.adapter import make_adapter
from zoo.tiny import Pair


@pytest.mark.parametrize(
    "options",
    [
        {"channel_scale": "rms", "group_size": 32},
        {"channel_scale": "rms", "group_size": 32, "rank": 8},
        {"channel_scale": "rms", "bits": 0.25, "rank": 8},
        {"channel_scale": "rms", "bits": 0.125},
        {"bits": 0, "rank": 4},
    ],
    ids=str,
)
def test_expected_size_is_near_the_real_size(pair: Pair, tmp_path: Path, options: dict[str, Any]) -> None:
    """Of the files, as the summary prints it, headers with it: on a model this small these are a fifth."""
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "a", CompressionSettings(salient=4, **options), None)
    manifest = compress(job, keep_weak=True)
    assert manifest.nbytes == pytest.approx(expected_bytes(job), rel=0.02)


def test_expected_size_of_an_adapter(pair: Pair, tmp_path: Path) -> None:
    adapter = make_adapter(pair[0], tmp_path / "adapter")
    job = prepare(str(pair[0]), str(adapter), tmp_path / "a", CompressionSettings(), None)
    assert compress(job).nbytes == pytest.approx(expected_bytes(job), rel=0.02)
