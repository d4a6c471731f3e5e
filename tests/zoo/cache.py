"""Where a built zoo lies, and how its folders get there whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .domains import EXPERTS
from .recipe import VERSION, Recipe


@dataclass(frozen=True)
class Zoo:
    """The files of one built zoo."""

    folder: Path
    names: tuple[str, ...] = EXPERTS

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def experts(self) -> dict[str, Path]:
        return {name: self.folder / "experts" / name for name in self.names}

    @property
    def calibration(self) -> dict[str, Path]:
        """Training items as JSONL: `{"prompt", "response", ...}` a line."""
        return {name: self.items_file(name, "train") for name in self.names}

    def items_file(self, name: str, part: str) -> Path:
        return self.folder / "data" / name / f"{part}.jsonl"

    def figures_file(self, name: str) -> Path:
        return self.folder / "figures" / f"{name}.json"


def folder_at(name: str, cache: Path | None = None) -> Path:
    """The folder of this name and the data's version under `cache`, `$MESWITCH_ZOO` or `~/.cache/meswitch-zoo`."""
    root = cache or Path(os.environ.get("MESWITCH_ZOO") or Path.home() / ".cache" / "meswitch-zoo")
    return root / f"v{VERSION}-{name}"


def zoo_at(recipe: Recipe, cache: Path | None = None) -> Zoo:
    """The zoo of this recipe, built or not."""
    return Zoo(folder_at(recipe.name, cache))


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}"
    # A builder that was killed leaves its own behind.
    for stale in target.parent.glob(f".{target.name}.*"):
        _remove(stale)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        _remove(temporary)


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """One builder at a time in this folder; others wait, and then find the work done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
