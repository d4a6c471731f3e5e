"""Triton launches on the current card, and a new thread's current card is the first one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Entry = TypeVar("_Entry", bound=Callable[..., Any])


def on_its_device(entry: _Entry) -> _Entry:
    """An entry point of the backend, run with its first argument's card as the current one."""

    @functools.wraps(entry)
    def guarded(first: Tensor, *rest: Any, **named: Any) -> Any:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return entry(first, *rest, **named)

    return cast(_Entry, guarded)
