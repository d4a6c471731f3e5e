"""Which expert a conversation is with."""

from __future__ import annotations

import threading
from collections import OrderedDict

#: Sessions remembered; the one least recently used is forgotten first.
MAX_SESSIONS = 100_000


class Sessions:
    """A bounded map from session key to expert, for any thread."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._experts: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> str | None:
        with self._lock:
            expert = self._experts.get(key)
            if expert is not None:
                self._experts.move_to_end(key)
            return expert

    def put(self, key: str, expert: str) -> None:
        with self._lock:
            self._experts[key] = expert
            self._experts.move_to_end(key)
            while len(self._experts) > self._limit:
                self._experts.popitem(last=False)

    def __len__(self) -> int:
        return len(self._experts)
