"""`meswitch env`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

#: Distributions whose versions a report of a problem should name.
PACKAGES = (
    *("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "triton", "numba", "tokenizers"),
    *("fastapi", "uvicorn", "httpx2", "xgrammar", "vllm", "lm-eval", "typer", "rich"),
)
#: Variables that change what meswitch does, beside those that begin with MESWITCH_.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TRITON_INTERPRET")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def run(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Put it under a report of a problem. It holds no keys, and no paths but those that variables hold.

    Example: meswitch env
    """
    found = environment()
    if as_json:
        typer.echo(json.dumps(found))
        return
    for title, values in found.items():
        typer.echo(title)
        for name, value in values.items():
            typer.echo(f"  {name:<18} {value}")


def environment() -> dict[str, dict[str, Any]]:
    """Versions, the machine, which kernels can run on it and why others cannot, its devices, variables."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "kernels": _kernels(),
        "devices": _devices(),
        "variables": _variables(),
    }


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from meswitch_cli import __version__

    found = {"meswitch": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
    import os
    import platform
    from pathlib import Path

    from meswitch_cli.model.device import available_bytes

    model = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    for line in cpus.read_text().splitlines() if cpus.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"system": platform.platform(), "processor": model, "cores": str(allowed)}
    import torch

    free = available_bytes(torch.device("cpu"))
    if free < 1 << 62:
        found["memory available"] = f"{free / 1e9:.1f} GB"
    return found


def _kernels() -> dict[str, str]:
    import torch

    from meswitch_kernels.dispatch import available_backends, default_backend

    found = {name: reason or "can run" for name, reason in available_backends().items()}
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        try:
            found[f"used on {device}"] = default_backend(device)
        except (ValueError, RuntimeError) as error:
            found[f"used on {device}"] = f"none: {error}"
    return found


def _devices() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return {"cuda": f"none; {built}"}
    found = {}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 1e9:.1f} GB, capability {card.major}.{card.minor}"
    found["cuda runtime"] = str(torch.version.cuda)
    return found


def _variables() -> dict[str, str]:
    import os

    names = sorted(name for name in os.environ if name.startswith("MESWITCH_") or name in VARIABLES)
    return {name: "(set)" if any(word in name for word in _SECRET) else os.environ[name] for name in names}
