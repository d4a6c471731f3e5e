"""Which experts are on the device, who may run, and who must wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meswitch_cli.engine.contract import BASE, Residency

if TYPE_CHECKING:
    from meswitch_cli.engine.expert import ServedModel
    from meswitch_cli.engine.generation import Generation


@dataclass
class Slot:
    """A place on the device.

    Attributes:
        expert: who is in it, or being loaded into it.
        since: when it was loaded, by the monotonic clock.
        draining: it takes no new requests, because another expert has waited too long.
    """

    expert: str | None = None
    loading: bool = False
    running: int = 0
    since: float = 0.0
    used: float = 0.0
    draining: bool = False


@dataclass
class Resident:
    """A served expert and its requests that wait."""

    model: ServedModel
    waiting: deque[Generation] = field(default_factory=deque)
    running: int = 0
    slot: int | None = None
    pinned: bool = False
    leaving: bool = False


@dataclass(frozen=True)
class Load:
    """An expert to be copied into a slot, from which another may be evicted."""

    expert: str
    slot: int


class SlotTable:
    """Decides admission, loading and eviction; moves no bytes. The caller holds a lock.

    A request of an expert on the device runs at once, oldest first, up to `max_running`. One of an expert that is not
    has it loaded into a free slot, or that of the idle expert used least recently. Where all are busy it waits at
    most `max_wait` seconds; then the slot loaded longest ago takes no new requests, and is given away when its
    running ones have ended. A slot keeps its expert for `max_wait` seconds, so that experts do not evict each other
    in turn without work done.
    """

    def __init__(self, slots: int, max_running: int, max_wait: float) -> None:
        self.slots = [Slot() for _ in range(slots)]
        self.max_running, self.max_wait = max_running, max_wait
        self.experts: dict[str, Resident] = {}
        #: Requests that run.
        self.admitted: set[Generation] = set()
        self.hits = self.loads = self.evictions = 0

    @property
    def running(self) -> int:
        return len(self.admitted)

    @property
    def waiting(self) -> int:
        return sum(len(expert.waiting) for expert in self.experts.values())

    @property
    def slots_used(self) -> int:
        return sum(slot.expert is not None for slot in self.slots)

    def add(self, model: ServedModel) -> None:
        self.experts[model.name] = Resident(model)

    def enqueue(self, generation: Generation) -> None:
        expert = self.experts[generation.model.name]
        expert.waiting.append(generation)
        if expert.slot is not None and not self.slots[expert.slot].loading:
            self.hits += 1

    def withdraw(self, generation: Generation) -> bool:
        """Take a waiting request back; whether it was waiting."""
        waiting = self.experts[generation.model.name].waiting
        if generation in waiting:
            waiting.remove(generation)
            return True
        return False

    def admit(self) -> list[Generation]:
        """Set the slots of the requests that run from now on, and return them, oldest first."""
        chosen: list[Generation] = []
        now = time.monotonic()
        ready = [expert for expert in self.experts.values() if expert.waiting and self._is_ready(expert)]
        while ready and self.running < self.max_running:
            expert = min(ready, key=lambda item: item.waiting[0].since)
            generation = expert.waiting.popleft()
            expert.running += 1
            self.admitted.add(generation)
            if expert.slot is not None:
                slot = self.slots[expert.slot]
                slot.running += 1
                slot.used = now
                generation.slot = expert.slot
            chosen.append(generation)
            if not expert.waiting:
                ready.remove(expert)
        return chosen

    def release(self, generation: Generation) -> bool:
        """A running request has ended; return whether it ran until now."""
        if generation not in self.admitted:
            return False
        self.admitted.remove(generation)
        expert = self.experts[generation.model.name]
        expert.running -= 1
        if expert.slot is not None:
            slot = self.slots[expert.slot]
            slot.running -= 1
            slot.used = time.monotonic()
        return True

    def start_loads(self) -> list[Load]:
        """Mark the slots to be filled now as loading, evict what was in them, and return them."""
        now = time.monotonic()
        absent = [
            expert for expert in self.experts.values() if self._needs_slot(expert) and (expert.waiting or expert.pinned)
        ]
        absent.sort(key=lambda item: item.waiting[0].since if item.waiting else now)
        starving = [item for item in absent if item.pinned or now - item.waiting[0].since > self.max_wait]
        self._drain(len(starving), now)
        loads = []
        for expert in absent:
            index = self._take_slot(expert in starving)
            if index is not None:
                loads.append(self._assign(expert, index, now))
        return loads

    def give_up(self) -> list[Generation]:
        """Take back the requests of experts that no slot will ever be free for, because others are pinned in all."""
        if sum(expert.pinned for expert in self.experts.values()) < len(self.slots):
            return []
        found: list[Generation] = []
        for expert in self.experts.values():
            if self._needs_slot(expert) and not expert.pinned:
                found += expert.waiting
                expert.waiting.clear()
        return found

    def prefetches(self) -> list[str]:
        """Experts whose requests wait for a slot: they may be read into host memory meanwhile."""
        return [name for name, expert in self.experts.items() if expert.waiting and self._needs_slot(expert)]

    def finish_load(self, load: Load) -> None:
        slot = self.slots[load.slot]
        slot.loading = False
        slot.since = slot.used = time.monotonic()
        self.loads += 1

    def fail_load(self, load: Load) -> list[Generation]:
        """Empty the slot again; return the requests that waited for it."""
        expert = self.experts[load.expert]
        self.slots[load.slot] = Slot()
        expert.slot, expert.pinned = None, False
        waited = list(expert.waiting)
        expert.waiting.clear()
        return waited

    def is_busy(self, expert: Resident) -> bool:
        """Whether requests of it run or wait, or its slot is being filled."""
        loading = expert.slot is not None and self.slots[expert.slot].loading
        return bool(expert.running or expert.waiting or loading)

    def remove(self, name: str) -> int | None:
        """Forget an expert without requests; return the slot it leaves."""
        slot = self.experts.pop(name).slot
        if slot is not None:
            self.slots[slot] = Slot()
        return slot

    def residency(self, expert: Resident, on_host: Container[str]) -> Residency:
        if expert.slot is not None and not self.slots[expert.slot].loading:
            return "device"
        return "host" if expert.model.name in on_host else "disk"

    def assign(self, name: str, slot: int) -> Load:
        """Give an expert a slot that is empty."""
        return self._assign(self.experts[name], slot, time.monotonic())

    def _is_ready(self, expert: Resident) -> bool:
        if expert.model.name == BASE:
            return True
        if expert.slot is None:
            return False
        slot = self.slots[expert.slot]
        return not slot.loading and not slot.draining

    def _needs_slot(self, expert: Resident) -> bool:
        return expert.slot is None and expert.model.name != BASE

    def _drain(self, needed: int, now: float) -> None:
        """Have as many slots drain as experts starve, less those that are free or idle anyway."""
        free = sum(self._is_idle(slot) or slot.expert is None for slot in self.slots)
        draining = sum(slot.draining for slot in self.slots)
        candidates = [
            slot
            for slot in self.slots
            if slot.expert
            and not slot.loading
            and not slot.draining
            and not self._is_idle(slot)
            and not self.experts[slot.expert].pinned
            and now - slot.since >= self.max_wait
        ]
        candidates.sort(key=lambda slot: slot.since)
        for slot in candidates[: max(0, needed - free - draining)]:
            slot.draining = True
        if not needed:
            for slot in self.slots:
                slot.draining = False

    def _is_idle(self, slot: Slot) -> bool:
        if slot.expert is None or slot.loading or slot.running:
            return False
        expert = self.experts[slot.expert]
        return not expert.pinned and not expert.waiting

    def _take_slot(self, starving: bool) -> int | None:
        empty = [index for index, slot in enumerate(self.slots) if slot.expert is None]
        if empty:
            return empty[0]
        idle = [index for index, slot in enumerate(self.slots) if self._is_idle(slot)]
        if starving and not idle:
            idle = [index for index, slot in enumerate(self.slots) if slot.draining and not slot.running]
        return min(idle, key=lambda index: self.slots[index].used, default=None)

    def _assign(self, expert: Resident, index: int, now: float) -> Load:
        old = self.slots[index].expert
        if old is not None:
            self.experts[old].slot = None
            self.evictions += 1
        self.slots[index] = Slot(expert.model.name, loading=True, since=now, used=now)
        expert.slot = index
        return Load(expert.model.name, index)
