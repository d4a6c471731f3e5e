"""Which adapters must let others have a slot of vLLM's: those in use would keep it for as long as requests come."""

from __future__ import annotations

from collections.abc import Set


class SlotTurns:
    """Says whose requests must not begin, so that no adapter waits without end; begins none itself.

    vLLM begins the oldest request whose adapter is in use or finds a slot free, and so passes over an adapter that has
    none for as long as requests of the others come. Here, as in `SlotTable`, an adapter that has waited for more than
    `max_wait` seconds has the one drain that has been in use longest: its running requests end, others of it do not
    begin. One keeps its slot for `max_wait` seconds, so that work is done between two loads.
    """

    def __init__(self, slots: int, max_wait: float) -> None:
        self._slots, self._max_wait = slots, max_wait
        #: Since when an adapter has had running requests without a break.
        self._used: dict[int, float] = {}
        #: Since when an adapter has had waiting requests of which none may begin.
        self._stalled: dict[int, float] = {}
        self._draining: set[int] = set()

    def held(self, running: Set[int], waiting: Set[int], now: float) -> Set[int]:
        """The adapters of which no request may begin now, given those of which some run, and of which some wait."""
        self._used = {adapter: self._used.get(adapter, now) for adapter in running}
        self._draining &= running
        stalled = waiting - (running - self._draining)
        self._stalled = {adapter: self._stalled.get(adapter, now) for adapter in stalled}
        absent = sorted(waiting - running, key=lambda adapter: self._stalled[adapter])
        starving = [adapter for adapter in absent if now - self._stalled[adapter] > self._max_wait]
        if not starving:
            self._draining.clear()
            return frozenset()
        free = self._slots - len(running)
        self._drain(len(starving) - free - len(self._draining), now)
        others = absent[len(starving) :]
        return self._draining.union(others[max(0, free - len(starving)) :])

    def _drain(self, needed: int, now: float) -> None:
        ready = [
            adapter
            for adapter, since in self._used.items()
            if adapter not in self._draining and now - since >= self._max_wait
        ]
        ready.sort(key=lambda adapter: self._used[adapter])
        self._draining.update(ready[: max(0, needed)])
