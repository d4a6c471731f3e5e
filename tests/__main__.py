"""The tools beside the tests: `python tests TOOL [ARGUMENT ...]`, in an environment that `make setup` made.

Without a tool it says which there are. Python looks for modules in the folder that it is given.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = {
    "demo": "demo",
    "gpu": "gpu.__main__",
    "zoo": "zoo.__main__",
    "tasks": "evaluation.make_tasks",
    "clients": "clients.__main__",
    "snippets": "docs.snippets",
} | {
    f"bench {file.stem}": f"benchmarks.{file.stem}"
    for file in sorted((HERE / "benchmarks").glob("*.py"))
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
}


def purpose(module: str) -> str:
    """The first line of a module's docstring."""
    source = HERE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main() -> int:
    words = sys.argv[1:]
    name = " ".join(words[: 2 if words[:1] == ["bench"] else 1])
    if name in TOOLS:
        sys.argv = [f"tests {name}", *words[len(name.split()) :]]
        runpy.run_module(TOOLS[name], run_name="__main__", alter_sys=True)
        return 0
    lines = [f"python tests {tool}\n    {purpose(module)}" for tool, module in TOOLS.items()]
    if words:
        lines = [f"no tool {name!r}; there are:", *lines]
    print("\n".join(lines), file=sys.stderr if words else sys.stdout)
    return 2 if words else 0


if __name__ == "__main__":
    sys.exit(main())
