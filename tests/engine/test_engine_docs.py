"""The example of docs/engine.md runs as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from engine.family import Family

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"


def test_example_runs(family: Family, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(family.base)
    (tmp_path / "maths-1bit").symlink_to(family.artifacts["alpha"])
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
