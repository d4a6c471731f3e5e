"""What vLLM's processes owe to a server of ours that started them: why they could not begin, and to end when it ends.

vLLM tells it only that they could not, and only its workers notice that their parent is gone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Names the file that the reason is written to, in processes that such a server started.
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
    """Have processes that are started meanwhile tell their reasons, and end with this one."""
    with tempfile.TemporaryDirectory(prefix="meswitch-") as folder:
        path = Path(folder, "refusal")
        os.environ[VARIABLE] = str(path)
        try:
            yield Refusal(path)
        finally:
            del os.environ[VARIABLE]


def tell_parent(reason: str) -> None:
    """Tell a server of ours that starts this process why it cannot begin."""
    path = os.environ.get(VARIABLE)
    if path and Path(path).parent.is_dir():
        Path(path).write_text(reason, encoding="utf-8")


class _FirstException(logging.Handler):
    """Tells a server of ours that starts this process the first exception that is logged, unless it knows more."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not Path(os.environ.get(VARIABLE, "")).is_file():
            tell_parent(traceback.format_exception_only(error)[-1].splitlines()[0])


def tell_of_exceptions() -> None:
    """Leave nothing to vLLM's log alone that keeps this process from beginning: a server of ours that starts it is told
    by vLLM that it could not, and no more."""
    if VARIABLE in os.environ and multiprocessing.parent_process() is not None:
        logging.getLogger("vllm").addHandler(_FirstException(logging.ERROR))


def end_with_parent() -> None:
    """Leave it to the server of ours that started this process when it ends, and end once that server is gone.

    A terminal sends Ctrl-C to all of its processes, while the server lets running requests end.
    """
    parent = multiprocessing.parent_process()
    if VARIABLE not in os.environ or parent is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="meswitch-parent", daemon=True).start()
