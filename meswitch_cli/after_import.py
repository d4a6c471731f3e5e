"""Something to do once a module of another package has been imported, without importing it before."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(module: str, act: Callable[[], None]) -> None:
    """Call `act` when `module` has been imported: at once if it has been, else at the end of its import."""
    if module in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Watcher(module, act))


class _Watcher(MetaPathFinder):
    """Finds one module as Python would, once, and does something when it has run."""

    def __init__(self, module: str, act: Callable[[], None]) -> None:
        self._module, self._act = module, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self._act()

        loader.exec_module = exec_module
        return spec
