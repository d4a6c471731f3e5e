"""Triton launches on the current card, and a new thread's current card is the first one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Entry = TypeVar("_Entry", bound=Callable[..., Any])


def on_its_device(entry: _Entry) -> _Entry:
    """An entry point of the backend, run with the card of its first argument, a tensor, as the current one."""

    @functools.wraps(entry)
    def guarded(*arguments: Any, **named: Any) -> Any:
        first: Tensor = next(iter((*arguments, *named.values())))
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return entry(*arguments, **named)

    return cast(_Entry, guarded)
