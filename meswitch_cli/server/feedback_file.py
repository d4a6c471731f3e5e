"""The file to which users' corrections of the router are appended, in the form that `train-router --data` reads."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from meswitch_cli.errors import MeswitchError

#: A file that grows beyond this is no longer feedback; more is refused.
MAX_BYTES = 64 << 20


class FeedbackFile:
    """A JSONL file that is only appended to, by any thread.

    Raises:
        MeswitchError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.open("ab").close()
        except OSError as error:
            raise MeswitchError(f"{path}: cannot be written: {error.strerror}") from error

    def append(self, prompt: str, domain: str | None) -> bool:
        """Add a line; False where the file is full."""
        line = json.dumps({"prompt": prompt, "domain": domain}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock, self.path.open("ab") as file:
            if file.tell() + len(line) > MAX_BYTES:
                return False
            file.write(line)
        return True
