"""The example in docs/kernels.md runs, and its tables name what exists."""

import re
from pathlib import Path

import meswitch_kernels
from meswitch_kernels.testing import ERROR_BOUND

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text()


def test_the_example_runs():
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(block, "docs/kernels.md", "exec"), {})


def test_every_public_name_is_described():
    missing = [name for name in meswitch_kernels.__all__ if f"`{name}`" not in PAGE]
    assert missing == ["TokenGroups"]


def test_error_bounds_are_those_of_the_tests():
    stated = dict(re.findall(r"^\| (float32|float16|bfloat16) \| (\S+) \|", PAGE, re.M))
    assert {name: float(bound) for name, bound in stated.items()} == {
        str(dtype).removeprefix("torch."): bound for dtype, bound in ERROR_BOUND.items()
    }


def test_every_script_and_result_exists():
    for script in re.findall(r"^\| `(\w+\.py)` \|", PAGE, re.M):
        assert (ROOT / "kernels" / "benchmarks" / script).exists()
    for result in re.findall(r"\((results/[\w-]+\.md)\)", PAGE):
        assert (ROOT / "docs" / result).exists()
