"""Which replica answers: one that has the expert on its device, unless it has much more to do than another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Requests that a replica which has the expert may have more than the idlest one before that one is asked: loading an
#: expert takes less than so many requests.
MOST_MORE = 8


@dataclass(eq=False)
class Load:
    """What the front knows of a replica.

    Attributes:
        ready: whether it takes requests.
        requests: sent to it and not answered yet.
        resident: experts on its device when it was last asked.
    """

    number: int
    ready: bool = False
    requests: int = 0
    resident: frozenset[str] = field(default_factory=frozenset)


def choose(loads: Iterable[Load], expert: str | None, session: str | None) -> Load | None:
    """The replica for a request, or None where none is ready.

    A session keeps its replica, which knows what the session's expert is and has its beginning cached. An expert that
    no replica has on its device has a home, so that not every replica loads every expert.
    """
    ready = [load for load in loads if load.ready]
    if not ready:
        return None
    if session:
        return _home(ready, session)
    idlest = min(ready, key=lambda load: (load.requests, load.number))
    if expert is None:
        return idlest
    having = [load for load in ready if expert in load.resident] or [_home(ready, expert)]
    best = min(having, key=lambda load: (load.requests, load.number))
    return idlest if best.requests > idlest.requests + MOST_MORE else best


def _home(loads: Iterable[Load], key: str) -> Load:
    """The replica that a key falls to, by the highest hash: when one goes, only its own keys move."""
    return max(loads, key=lambda load: hashlib.blake2b(f"{load.number} {key}".encode(), digest_size=8).digest())
