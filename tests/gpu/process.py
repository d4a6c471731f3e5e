"""A part: one command with a limit, in a process group that ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu import figures
from gpu.timebox import LIMIT

PASSED = "passed"
#: Seconds between asking a group to end and ending it.
GRACE = 3


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        limit: seconds that it may take.
        least: seconds that are kept for it while earlier parts run.
        card: whether it needs a CUDA device.
    """

    name: str
    title: str
    command: Sequence[str]
    limit: float
    least: float = 10
    card: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        status: `passed`, or what went wrong.
        last: the last lines of its log, sixty at most.
    """

    status: str
    seconds: float = 0.0
    figures: Sequence[Mapping[str, Any]] = ()
    last: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        return self.status == PASSED


@dataclass
class Running:
    """A part that has been started."""

    part: Part
    process: subprocess.Popen[bytes]
    log: Path
    limit: float
    started: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.started > self.limit

    def outcome(self) -> Outcome:
        """End what is left of the group, and read the log."""
        code = self.process.poll()
        end_group(self.process)
        seconds = time.monotonic() - self.started
        lines = self.log.read_text(errors="replace").splitlines()
        if code is None:
            status = f"out of time: stopped after {self.limit:.0f} s"
        elif code:
            status = f"failed: {'signal' if code < 0 else 'exit'} {abs(code)}"
        else:
            status = PASSED
        return Outcome(status, round(seconds, 1), figures.read(lines), tuple(lines[-60:]))


def start(part: Part, limit: float, log: Path, environment: Mapping[str, str]) -> Running:
    """Start a part, its output going to `log`."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(part.command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**environment, LIMIT: str(limit)},
            start_new_session=True,
        )
    return Running(part, process, log, limit)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; returns when it has gone."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + GRACE
        while _alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.wait()


def _alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def ended(processes: list[Running]) -> Iterator[list[Running]]:
    """The list, whose processes do not outlive the block."""
    try:
        yield processes
    finally:
        for item in processes:
            end_group(item.process)
