"""Kill a real compression at random moments and compare the bytes it ends with. Writes docs/results/interrupts.md.

python tests bench interrupts [--kills 20]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import zoo
from benchmarks.machine import describe

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "interrupts.md"
EXPERT = "maths"


def start(family: zoo.Zoo, out: Path) -> int:
    """Start `meswitch compress` and return its process id."""
    arguments = ["compress", "--base", str(family.base), "--expert", str(family.experts[EXPERT]), "--out", str(out)]
    with Path(os.devnull).open("w") as nowhere:
        actions = [(os.POSIX_SPAWN_DUP2, nowhere.fileno(), 1), (os.POSIX_SPAWN_DUP2, nowhere.fileno(), 2)]
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "meswitch_cli", *arguments],
            dict(os.environ),
            file_actions=actions,
            setsigdef=[signal.SIGINT],  # a background job would pass on that it ignores Ctrl-C
        )


def digest(folder: Path) -> str:
    """One hash over the names and bytes of a folder's files."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def wait_for_work(out: Path) -> float:
    """Wait until the run has begun its first unit; returns the moment."""
    identity = out.parent / f".{out.name}.partial" / "identity.json"
    while not identity.exists() and not out.exists():
        time.sleep(0.01)
    return time.perf_counter()


def shards_kept(out: Path) -> int:
    """Finished units that a killed run left."""
    return len(list(out.parent.glob(f".{out.name}.partial/unit-*.json")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    family = zoo.paths()
    generator = random.Random(0)
    lines, equal = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        child = start(family, folder / "whole")
        began = wait_for_work(folder / "whole")
        if os.waitpid(child, 0)[1]:
            raise SystemExit("the uninterrupted run failed")
        duration = time.perf_counter() - began
        expected = digest(folder / "whole")
        for kill in range(arguments.kills):
            out = folder / f"killed-{kill}"
            kind = signal.SIGKILL if kill % 2 == 0 else signal.SIGINT
            moment = generator.uniform(0, duration)
            child = start(family, out)
            wait_for_work(out)
            time.sleep(moment)
            os.kill(child, kind)
            os.waitpid(child, 0)
            kept = shards_kept(out)
            if not out.exists() and os.waitpid(start(family, out), 0)[1]:
                raise SystemExit(f"the run resumed after kill {kill + 1} failed")
            same = digest(out) == expected
            equal += same
            lines.append(f"| {kill + 1} | {kind.name} | {moment:.1f} | {kept} | {'yes' if same else 'NO'} |")
            print(lines[-1], flush=True)
    RESULTS.write_text(
        f"# Killed and resumed\n\n{equal} of {arguments.kills} resumed runs ended with the bytes of the "
        f"uninterrupted run ({duration:.1f} s of work, 31 units) on the zoo's {EXPERT} expert.\n\n"
        f"`python tests bench interrupts --kills {arguments.kills}`, {describe()}.\n\n"
        "| kill | signal | s into the work | units kept | same bytes |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n"
    )
    if equal != arguments.kills:
        raise SystemExit(f"{arguments.kills - equal} results differ")


if __name__ == "__main__":
    main()
