"""Fixtures shared by the tests: tiny checkpoints, and a way to compress them."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, which reads it then

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.pack import MAX_SHARD_BYTES
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from zoo.tiny import Pair, make_pair

torch.set_num_threads(1)  # tiny tensors; threads would only wait for each other

with contextlib.suppress(ImportError):  # a machine that only has what runs on a GPU is without it
    import hypothesis

    hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed is the same every time, whichever tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny Llama and a fine-tune of it."""
    return make_pair(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations as JSONL."""
    path = tmp_path_factory.mktemp("calibration") / "calibration.jsonl"
    lines = [{"prompt": f"what is {n} plus two", "response": f"it is {n + 2}, of course"} for n in range(40)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def make_artifact(tmp_path: Path, calibration_file: Path) -> Callable[..., Artifact]:
    """A function `(pair, *, calibrated=False, out="artifact", **settings)` that compresses and opens the result; with
    `max_shard_bytes=1` every unit is a file."""

    def make(
        pair: Pair,
        *,
        calibrated: bool = False,
        out: str = "artifact",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        **settings: Any,
    ) -> Artifact:
        data = read_calibration(calibration_file) if calibrated else None
        chosen = CompressionSettings(
            **(
                {"salient": 4, "samples": 4, "sequence_length": 32, "calibration": data.sha256 if data else None}
                | settings
            )
        )
        job = prepare(str(pair[0]), str(pair[1]), tmp_path / out, chosen, data)
        compress(job, keep_weak=True, max_shard_bytes=max_shard_bytes)
        return Artifact.open(job.out)

    return make
