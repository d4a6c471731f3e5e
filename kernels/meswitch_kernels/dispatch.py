"""Which backend serves a device, and why another one does not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

BACKENDS = ("naive", "cpu", "triton")
ENVIRONMENT_VARIABLE = "MESWITCH_KERNEL"
_MODULES = {"naive": "naive", "cpu": "cpu", "triton": "triton_ops"}


@functools.cache
def unavailable_reason(backend: str) -> str | None:
    """Why `backend` cannot run here, or None where it can."""
    needs = {"cpu": "numba", "triton": "triton"}.get(backend)
    if needs and importlib.util.find_spec(needs) is None:
        return f"the {backend} backend needs the package {needs}, which is not installed"
    if backend == "triton" and not (torch.cuda.is_available() or _interpreting()):
        return "the triton backend needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    return None


@functools.cache
def default_backend(device_type: str) -> str:
    """The backend for tensors on `device_type`: `MESWITCH_KERNEL` where set, else the fastest available.

    The environment is read at the first call for a device type and remembered. Raises ValueError for an
    unknown name and RuntimeError where the backend asked for cannot run here. Warns where a GPU is left to `naive`.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE)
    if asked:
        return checked_backend(asked, device_type, f"{ENVIRONMENT_VARIABLE}={asked}")
    fastest = {"cuda": "triton", "cpu": "cpu"}.get(device_type, "naive")
    reason = unavailable_reason(fastest)
    if reason and device_type == "cuda":
        warnings.warn(
            f"{reason}; the naive backend serves instead, many times slower: it waits for the device in every layer "
            "and cannot be captured in a CUDA graph",
            RuntimeWarning,
            stacklevel=2,
        )
    return "naive" if reason else fastest


@functools.cache
def checked_backend(name: str, device_type: str, source: str = "backend") -> str:
    """Return `name` where that backend runs here on `device_type`, else raise saying why not."""
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    reason = unavailable_reason(name)
    if reason is None and name == "cpu" and device_type != "cpu":
        reason = f"the cpu backend cannot read tensors on {device_type}"
    if reason is None and name == "triton" and device_type != "cuda" and not _interpreting():
        reason = f"the triton backend cannot read tensors on {device_type}"
    if reason:
        raise RuntimeError(f"{source}: {reason}")
    return name


def reads_planes(device_type: str) -> bool:
    """Whether the kernels of a device type want codes in planes: where Triton serves it."""
    if device_type == "cuda":
        return unavailable_reason("triton") is None
    return device_type == "cpu" and default_backend("cpu") == "triton"


def available_backends() -> dict[str, str | None]:
    """Every backend with None where it can run here, else the reason why not."""
    return {name: unavailable_reason(name) for name in BACKENDS}


@functools.cache
def backend_module(name: str) -> ModuleType:
    """The module of a backend, imported at first use."""
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
