"""The Triton kernels compiled ahead of time: no GPU is needed, and nothing may spill."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "kernels" / "benchmarks" / "compile_report.py"


@pytest.fixture(scope="module")
def report():
    """Compiled in a process of its own, since in this one Triton may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json", "--quick"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("arch", [80, 90])
def test_no_kernel_spills(report, arch):
    rows = [row for row in report if row["arch"] == arch]
    used = {f"{row['kernel']}/{row['steps']}/{row['rank']}/{row['tokens']}": row for row in rows}
    assert {row["kernel"] for row in used.values()} == {
        "decode", "prepare", "embedding_rows", "norm_rows", "added_row_logits", "group_by_slot",
        "merge_rows", "merge_siblings", "decode_siblings", "prepare_siblings", "turn_heads", "gate_rows",
        "rearrange_codes", "decode_pages", "prompt_pages", "write_prompts",
    }  # fmt: skip
    few = {name: row["spilled_bytes"] for name, row in used.items() if row["spilled_bytes"]}
    assert {name: row["tokens"] for name, row in used.items() if name in few and row["tokens"] < 32} == {}
    # Beside tiles of 16, three numbers that are stored and read again once a tile, none in an inner loop (below).
    assert {row["tokens"] for row in used.values()} >= {16, 32} and max(few.values(), default=0) <= 28


def test_every_kernel_that_is_launched_is_compiled(report):
    """The interpreter takes what the compiler refuses."""
    launched = set()
    for path in SCRIPT.parents[1].joinpath("meswitch_kernels").glob("triton_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name):
                launched.add(call.func.value.id)
    assert launched and launched <= {row["kernel"] for row in report}


@pytest.mark.parametrize(("arch", "limit"), [(80, 163 << 10), (90, 227 << 10)])
def test_shared_memory_fits_the_chip(report, arch, limit):
    assert max(row["shared_bytes"] for row in report if row["arch"] == arch) <= limit


def test_decode_spends_few_instructions_on_a_weight():
    """And no code passes through shared memory on its way from a word to the tensor core."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT.with_name("machine_code.py")), "--json", "--quick"]
    loops = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert [(loop["bits"], loop["tile_tokens"]) for loop in loops] == [(2, 8), (0.25, 8), (1, 16), (2, 16)]
    for loop in loops:
        assert loop["instructions"] < 1.3 * loop["weights"]
        assert loop["shared_stores"] == loop["spills"] == 0
        assert loop["copy_bytes"] == 16
