"""Which expert a conversation is with."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

#: Sessions remembered; the one least recently used is forgotten first.
MAX_SESSIONS = 100_000
#: Seconds without a word after which a conversation begins anew: by then its cache is another's.
IDLE_SECONDS = 1800.0


class Sessions:
    """A bounded map from session key to expert, for any thread; one that was not asked for in a while is forgotten."""

    def __init__(
        self,
        limit: int = MAX_SESSIONS,
        idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._idle_seconds, self._clock = limit, idle_seconds, clock
        self._experts: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> str | None:
        now = self._clock()
        with self._lock:
            expert, last = self._experts.pop(key, (None, now))
            if expert is None or now - last > self._idle_seconds:
                return None
            self._experts[key] = expert, now
            return expert

    def put(self, key: str, expert: str) -> None:
        now = self._clock()
        with self._lock:
            self._experts[key] = expert, now
            self._experts.move_to_end(key)
            while len(self._experts) > self._limit:
                self._experts.popitem(last=False)

    def __len__(self) -> int:
        return len(self._experts)
