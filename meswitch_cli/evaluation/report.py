"""`report.json`: everything an evaluation found, written anew after every step so that a crash keeps what is done."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from meswitch_cli import __version__
from meswitch_cli.artifact.disk import write_atomically
from meswitch_cli.model.dtype import dtype_name

SCHEMA_VERSION = 1
REPORT_FILE = "report.json"
_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "lm-eval", "datasets")


@dataclass
class Report:
    """The content of `report.json`; docs/evaluation.md says what each part holds.

    Attributes:
        options: of the call, as far as they change figures.
        complete: the evaluation ran to its end; `errors` may still name parts that failed.
        errors: `{"where", "message"}` of what could not be measured.
        notes: what a reader must know to judge the figures.
    """

    seed: int
    options: dict[str, Any]
    environment: dict[str, Any]
    base: dict[str, Any]
    experts: list[dict[str, Any]]
    models: list[dict[str, Any]]
    sets: list[dict[str, Any]] = field(default_factory=list)
    fidelity: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    flips: list[dict[str, Any]] = field(default_factory=list)
    router: dict[str, Any] | None = None
    tensors: list[dict[str, Any]] = field(default_factory=list)
    saliency: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    schema_version: int = SCHEMA_VERSION

    @property
    def passed(self) -> bool:
        """Whether every limit holds and everything could be measured."""
        return all(gate["passed"] for gate in self.gates) and not self.errors

    def to_dict(self) -> dict[str, Any]:
        value: dict[str, Any] = _finite(asdict(self))
        return {"schema_version": self.schema_version} | value

    def save(self, folder: Path) -> None:
        """Write `report.json` in one rename."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / REPORT_FILE, text.encode())

    def fail(self, where: str, message: str) -> None:
        """Note something that could not be measured."""
        self.errors.append({"where": where, "message": message})


def environment(device: torch.device, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    """Versions, machine and arithmetic."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "meswitch": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(dtype),
        "mode": mode,
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: None stands for both."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
