"""Copies of experts in host memory, from which a slot is filled faster than from disk."""

from __future__ import annotations

from collections import OrderedDict

from meswitch_cli.engine.banks import Parts


class HostCopies:
    """Experts' tensors by their artifact's digest, the least recently used given up first.

    Attributes:
        limit: in bytes; None is none.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._parts: OrderedDict[str, Parts] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._parts

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(parts) for parts in tuple(self._parts.values()))

    def get(self, key: str) -> Parts | None:
        if key in self._parts:
            self._parts.move_to_end(key)
        return self._parts.get(key)

    def put(self, key: str, parts: Parts) -> None:
        if self.limit is not None and _nbytes(parts) > self.limit:
            return
        self._parts[key] = parts
        while self.limit is not None and self.nbytes > self.limit:
            self._parts.popitem(last=False)

    def forget(self, key: str) -> None:
        self._parts.pop(key, None)


def _nbytes(parts: Parts) -> int:
    return sum(tensor.nbytes for tensor in parts.values())
