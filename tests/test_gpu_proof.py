"""The proof run on tiny shapes, without a card: every part that needs none, and how one that fails is shown."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE, until

from gpu import figures
from gpu.against import LoraLinear
from gpu.goals import goals
from gpu.load import quantile
from gpu.page import BEGIN, END, PAGE, with_run
from gpu.parts import NAMES, stages
from gpu.process import PASSED, Outcome, Part, start
from gpu.summary import Heading, summary
from meswitch_kernels.testing import random_call

ROOT = Path(__file__).parents[1]
HEADING = Heading("python tests gpu", "abc", "2026-01-01", "none", "none", {"torch": "2"}, True)
NEEDS_CARD = {"linear", "decoder"}
#: Seconds that nothing needs: what a run leaves out for want of time is not what is asked here.
BUDGET = ("--budget", "7200")


def proof(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests", "gpu", "--out", str(out), "--scratch", str(out / "scratch"), *BUDGET, *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def run(script: str, folder: Path, limit: float = PATIENCE) -> Outcome:
    """The outcome of a part that is a line of Python."""
    part = Part("part", "A part", [sys.executable, "-u", "-c", script], limit)
    running = start(part, limit, folder / "part.log", os.environ)
    while running.process.poll() is None and not running.late:
        time.sleep(0.01)
    return running.outcome()


def test_every_part_that_needs_no_card_passes(tmp_path: Path) -> None:
    done = proof(tmp_path, "--tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["parts"]) == set(NAMES) - NEEDS_CARD
    assert {part["status"] for part in results["parts"].values()} == {PASSED}
    rows = [row for part in results["parts"].values() for row in part["figures"]]
    assert {row["figure"] for row in rows} >= {
        "smoke",
        "compress",
        "start",
        "decode",
        "prefill",
        "profile",
        "dense",
        "switch",
        "serve",
        "stop",
    }
    decoded = [row for row in rows if row["figure"] == "decode"]
    assert {(row["experts"], row["requests"]) for row in decoded} >= {(0, 1), (1, 1), (3, 3), (4, 4)}
    for row in decoded:
        assert row["tokens_per_second"] > 0 and row["errors"] == []
        assert 0 < row["step_ms_p50"] <= row["step_ms_p99"] and row["steps"] == 6
    assert all(row["loads"] for row in rows if row["figure"] == "switch")
    assert [row["exit"] for row in rows if row["figure"] == "stop"] == [0]
    assert all(row["failed"] == 0 and row["requests"] > 0 for row in rows if row["figure"] == "serve")
    assert all(row["passed"] > 0 for row in rows if row["figure"] == "tests")
    page = (tmp_path / "summary.md").read_text()
    assert page in done.stdout and "# Proof without a GPU" in page and "## Generation" in page
    assert {path.stem for path in (tmp_path / "logs").iterdir()} == set(results["parts"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_real_run_is_refused(tmp_path: Path) -> None:
    for words in ((), ("--tiny", "--only", "linear,decoder")):
        refused = proof(tmp_path, *words)
        assert refused.returncode == 2 and "CUDA device" in refused.stderr
    assert proof(tmp_path, "--only", "nothing").returncode == 2


def test_parts_are_named_once_and_leave_time_for_each_other(tmp_path: Path) -> None:
    for tiny in (False, True):
        parts = [part for stage in stages(tmp_path, tiny) for part in stage]
        assert sorted(part.name for part in parts if not (tiny and part.card)) == sorted(
            set(NAMES) - (NEEDS_CARD if tiny else set())
        )
    assert sum(max(part.least for part in stage) for stage in stages(tmp_path, False)) < 500


def test_a_part_that_fails_shows_its_status_and_its_last_lines(tmp_path: Path) -> None:
    outcome = run("print('before'); raise SystemExit(3)", tmp_path)
    assert (outcome.status, outcome.passed) == ("failed: exit 3", False)
    killed = run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", tmp_path)
    assert killed.status == "failed: signal 11"
    part = Part("part", "A part", [], 30)
    page = summary(HEADING, [part], {"part": outcome})
    assert "| part | A part | **failed: exit 3** |" in page and "    before\n" in page


def test_a_part_out_of_time_leaves_its_figures_and_no_process(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; from gpu.figures import say; say('decode', what='so far', requests=1);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print('child', child.pid); print('{\"figure\": \"dec'); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    part = Part("part", "A part", [sys.executable, "-u", "-c", script], 4)
    running = start(part, 4, tmp_path / "part.log", environment)
    until(lambda: '"dec\n' in running.log.read_text())  # the last line; a whole figure has `"decode"`
    running.started -= running.limit  # its time is over
    assert running.late
    outcome = running.outcome()
    assert outcome.status == "out of time: stopped after 4 s"
    assert outcome.figures == [{"figure": "decode", "what": "so far", "requests": 1}]
    child = next(int(line.split()[1]) for line in outcome.last if line.startswith("child"))
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    assert "so far" in summary(HEADING, [part], {"part": outcome})


def test_no_time_left_is_a_failure(tmp_path: Path) -> None:
    done = proof(tmp_path, "--tiny", "--only", "probe", "--budget", "0")
    assert done.returncode == 1 and "**no time left**" in done.stdout


def test_counts_of_a_pytest_run_are_figures() -> None:
    log = [
        "...F",
        "FAILED tests/kernels/test_a.py::test_b[1] - assert 1 == 2",
        "1 failed, 44 passed, 2 skipped in 3.21s",
    ]
    assert figures.read(log) == [
        {
            "figure": "tests",
            "failed": 1,
            "passed": 44,
            "skipped": 2,
            "failures": ["tests/kernels/test_a.py::test_b[1] - assert 1 == 2"],
        }
    ]
    part = Part("kernels", "Kernel tests", [], 30)
    page = summary(HEADING, [part], {"kernels": Outcome("failed: exit 1", 1.0, figures.read(log))})
    assert "44 passed, 1 failed, 2 skipped" in page and "- `tests/kernels/test_a.py::test_b[1]" in page


def test_tests_for_which_there_is_no_time_are_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW)
    for limit, passed in ((20, True), (0, False)):
        outcome = _slow(tmp_path, limit)
        (counts,) = outcome.figures
        assert outcome.passed == passed == (counts.get("passed", 0) > 0), outcome.last
        assert counts["not begun"] > 0 and counts["skipped"] == 0
        assert counts.get("passed", 0) + counts["not begun"] == 60
    page = summary(HEADING, [Part("slow", "Slow tests", [], 6)], {"slow": outcome})
    assert "**failed: exit 5**, 0 skipped, 60 not begun" in page


#: Sixty tests of 0.3 s each, by a clock of their own: the plugin's limit is met on a machine of any speed.
SLOW = """
import types, pytest
from gpu import timebox

now = timebox._BEGAN + 0.1
timebox.time = types.SimpleNamespace(monotonic=lambda: now)

@pytest.mark.parametrize("n", range(60))
def test_one(n):
    global now
    now += 0.3
"""


def _slow(folder: Path, limit: float) -> Outcome:
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), str(folder), "-p", "gpu.timebox"]
    part = Part("slow", "Slow tests", [*command, "-p", "no:cacheprovider"], limit)
    running = start(part, limit, folder / "slow.log", os.environ | {"PYTHONPATH": str(ROOT / "tests")})
    running.process.wait(PATIENCE)
    return running.outcome()


def test_goals_are_judged_by_the_figures() -> None:
    rows: list[dict[str, Any]] = [
        {"figure": "decoder", "bits": 2, "experts": 16, "tokens": 16, "times_base": 3.6},
        {"figure": "decoder", "bits": 0.25, "experts": 16, "tokens": 16, "times_base": 1.4},
        {"figure": "decode", "what": "2 bit: experts", "bits": "2", "experts": 16, "requests": 16, "step_ms_p50": 6.0},
        {"figure": "decode", "what": "the base alone", "bits": None, "experts": 0, "requests": 16, "step_ms_p50": 2.0},
        {"figure": "linear_prefill", "tokens": 2048, "which": "as the engine plans", "of_cublas_on_merged": 0.9},
        {"figure": "linear_prefill", "tokens": 2048, "which": "as the engine plans", "of_cublas_on_merged": 0.8},
        {"figure": "linear_prefill", "tokens": 2048, "which": "without a plan", "of_cublas_on_merged": 0.2},
        {"figure": "profile", "what": "2 bit", "experts": 16, "kernels_of_32_layers": 400, "top": []},
    ]
    told = {what: (bound, measured, met) for what, bound, measured, met in goals(rows)}
    assert told["decoder: 16 experts of 2 bits, times the base's step"] == ("at most 3.5", "3.6", "**no**")
    assert told["decoder: 16 experts of 1/4 bit and rank 16, times the base's step"] == ("at most 1.5", "1.4", "yes")
    assert told["engine: 16 experts of 2 bits, times the base alone"] == ("at most 3.5", "3", "yes")
    assert told["prefill of 2,048 tokens, of cuBLAS on merged weights"] == ("at least 0.85", "0.8", "**no**")
    assert told["kernels of a decode step, of 32 layers"] == ("at most 450", "400", "yes")
    assert told["decoder: one expert of 2 bits, times the base's step"] == ("at most 1.2", "not measured", "")
    assert goals([]) == []
    part = Part("decoder", "Decoder", [], 30)
    page = summary(replace(HEADING, tiny=False), [part], {"decoder": Outcome(PASSED, 1.0, rows)})
    assert "## Goals" in page and "| 3.6 | **no** |" in page
    assert "## Goals" not in summary(HEADING, [part], {"decoder": Outcome(PASSED, 1.0, rows)})


def test_a_run_takes_its_place_on_the_page() -> None:
    page = PAGE.read_text()
    published = with_run(page, "# Proof on a GPU\n\nCard: one.\n\n## Goals\n\n| a |\n")
    assert "\n## Proof on a GPU\n\nCard: one.\n\n### Goals\n" in published
    assert published.startswith(page.partition(BEGIN)[0]) and published.endswith(page.partition(END)[2])
    assert with_run(published, "# Other").count("Card: one.") == 0
    with pytest.raises(ValueError, match="needs the marks"):
        with_run("# A page\n", "# Run")


def test_stacked_adapters_are_each_tokens_own() -> None:
    call = random_call(9, 96, 64, bits=1, slots=3, rank=(16, 4, 16), dtype=torch.float32, pattern="mixed")
    held = call.bank.tensors
    expected = []
    for x, slot in zip(call.x, call.slot_of_token.tolist(), strict=True):
        y = call.weight @ x
        expected.append(y if slot < 0 else y + held.left[slot] @ (held.right[slot] @ x))
    lora = LoraLinear()
    for _ in range(2):
        got = lora(call.x, call.weight, None, held, call.slot_of_token)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_quantiles() -> None:
    assert quantile([3, 1, 2], 0.5) == 2 and quantile(range(100), 0.99) == 99
    assert math.isnan(quantile([], 0.5))
