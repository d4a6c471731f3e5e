"""The proof on a GPU: kernels, truth, compression, engine, switching and server in less than ten minutes.

    python tests gpu [--out build/gpu] [--budget 560] [--only engine-2,serve] [--tiny]

Needs a CUDA device, torch, triton, transformers and pytest; no set-up, no network, no installed meswitch. Writes
summary.md, results.json and logs/PART.log, after every part. Exit status 1 where a part failed or had no time,
and 2 without a device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from gpu.page import PAGE, with_run
from gpu.parts import NAMES, stages
from gpu.process import Outcome, Part, Running, ended, start
from gpu.summary import Heading, summary

ROOT = Path(__file__).parents[2]


def environment(scratch: Path, card: bool) -> dict[str, str]:
    """What the parts are told: this checkout before what is installed, no network, one cache of compiled kernels.

    Without a card nothing is timed, and the backend that has nothing to compile will do.
    """
    paths = [ROOT, ROOT / "kernels", ROOT / "kernels" / "benchmarks", ROOT / "tests"]
    told = {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
    }
    if not card:
        told |= {"OMP_NUM_THREADS": "1", "MESWITCH_KERNEL": "naive"}
    return os.environ | told


class Proof:
    """The parts' outcomes so far, written down after each."""

    def __init__(self, out: Path, heading: Heading, told: Mapping[str, str], deadline: float) -> None:
        self.out, self.heading, self.told, self.deadline = out, heading, told, deadline
        self.parts: list[Part] = []
        self.outcomes: dict[str, Outcome] = {}

    def run(self, chosen: Sequence[Sequence[Part]]) -> None:
        """Run the stages one after the other, and the parts of a stage side by side."""
        for number, stage in enumerate(chosen):
            kept = sum(max(part.least for part in later) for later in chosen[number + 1 :])
            left = self.deadline - time.monotonic() - kept
            with ended([]) as running:
                for part in stage:
                    self.parts.append(part)
                    if left < min(part.least, part.limit):
                        self._note(part, Outcome("no time left"))
                        continue
                    limit = min(part.limit, left)
                    running.append(start(part, limit, self.out / "logs" / f"{part.name}.log", self.told))
                self._wait(list(running))

    def _wait(self, running: list[Running]) -> None:
        while running:
            for item in list(running):
                if item.process.poll() is not None or item.late:
                    running.remove(item)
                    self._note(item.part, item.outcome())
            time.sleep(0.1)

    def _note(self, part: Part, outcome: Outcome) -> None:
        self.outcomes[part.name] = outcome
        print(f"{part.name:<12} {outcome.seconds:6.1f} s  {outcome.status}", file=sys.stderr, flush=True)
        told = {name: asdict(item) for name, item in self.outcomes.items()}
        (self.out / "results.json").write_text(json.dumps({**asdict(self.heading), "parts": told}, indent=1) + "\n")
        (self.out / "summary.md").write_text(summary(self.heading, self.parts, self.outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of summary, results and logs")
    parser.add_argument(
        "--scratch", type=Path, default=Path("build/gpu-scratch"), help="folder of models and compiled kernels"
    )
    parser.add_argument("--budget", type=float, default=560, help="seconds in all")
    parser.add_argument("--only", help="names of parts, with commas: " + ", ".join(NAMES))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, and no card: shows that the parts run")
    parser.add_argument("--commit", help="the commit, where this is not a git checkout")
    parser.add_argument(
        "--publish", type=Path, metavar="SUMMARY", help="put a run's summary.md into docs/results/gpu.md"
    )
    options = parser.parse_args()
    if options.publish:
        PAGE.write_text(with_run(PAGE.read_text(), options.publish.read_text()))
        return 0
    started = time.monotonic()
    only = options.only.split(",") if options.only else list(NAMES)
    if unknown := sorted(set(only) - set(NAMES)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(NAMES)}")
    card = torch.cuda.is_available()
    if not card and not options.tiny:
        print("no CUDA device: --tiny runs the parts that need none", file=sys.stderr)
        return 2
    out, scratch = options.out.absolute(), options.scratch.absolute() / ("tiny" if options.tiny else "full")
    for folder in (out / "logs", scratch):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the parts are ended too
    command = " ".join(["python tests gpu", *sys.argv[1:]])
    heading = Heading.of(command, options.tiny, options.commit, ROOT)
    proof = Proof(out, heading, environment(scratch, card), started + options.budget)
    os.chdir(ROOT)
    chosen = [
        [part for part in stage if part.name in only and (card or not part.card)]
        for stage in stages(scratch, options.tiny)
    ]
    proof.run([stage for stage in chosen if stage])
    if not proof.outcomes:
        print(f"{options.only}: needs a CUDA device", file=sys.stderr)
        return 2
    print((out / "summary.md").read_text())
    return int(not all(outcome.passed for outcome in proof.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
