"""Kills at random moments, on the tiny family; benchmarks/interrupts.py does the same to a real model."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from zoo.tiny import make_pair

KILLS = 10


def _in_child(base: Path, expert: Path, out: Path) -> int:
    """Compress in a forked process and return its id."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can take it
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            compress(prepare(str(base), str(expert), out, CompressionSettings(salient=4), None))
        except BaseException:
            os._exit(1)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return child


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_killed_runs_end_with_the_same_bytes(tmp_path: Path, kind: signal.Signals) -> None:
    base, expert = make_pair(tmp_path, num_hidden_layers=6)
    started = time.perf_counter()
    assert os.waitpid(_in_child(base, expert, tmp_path / "whole"), 0)[1] == 0
    duration = time.perf_counter() - started
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    generator = random.Random(0)
    killed = index = 0
    while killed < KILLS:  # where the machine is busy, runs take now longer, now shorter
        index += 1
        assert index < 10 * KILLS
        out = tmp_path / f"out{index}"
        started = time.perf_counter()
        child = _in_child(base, expert, out)
        time.sleep(generator.uniform(0, duration))
        os.kill(child, kind)
        met = os.waitpid(child, 0)[1] != 0
        killed += met
        if not met:
            duration = min(duration, time.perf_counter() - started)
        if not out.exists():
            assert os.waitpid(_in_child(base, expert, out), 0)[1] == 0
        elif list(tmp_path.glob(f".out{index}*")):  # killed after the artifact was there, while it cleaned up
            assert os.waitpid(_in_child(base, expert, out), 0)[1] != 0  # refused without --force, and cleaned up
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
        assert not list(tmp_path.glob(f".out{index}*"))
