"""Why a process of vLLM could not begin, for the server that started it: vLLM itself says only that it could not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: A file that vLLM's processes, which inherit the variable, write the reason to.
VARIABLE = "MESWITCH_VLLM_REFUSAL"


class Refusal:
    """What is known of a start that is under way."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def reason(self) -> str | None:
        return self._path.read_text(encoding="utf-8") if self._path.exists() else None


@contextmanager
def told_by_children() -> Iterator[Refusal]:
    """Have processes that are started meanwhile tell their reasons."""
    with tempfile.TemporaryDirectory(prefix="meswitch-") as folder:
        path = Path(folder, "refusal")
        os.environ[VARIABLE] = str(path)
        try:
            yield Refusal(path)
        finally:
            del os.environ[VARIABLE]


def tell_parent(reason: str) -> None:
    """Tell a server that listens, if there is one."""
    path = os.environ.get(VARIABLE)
    if path and Path(path).parent.is_dir():
        Path(path).write_text(reason, encoding="utf-8")
