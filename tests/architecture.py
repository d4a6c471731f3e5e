"""Who imports whom in the product, read from its sources.

`python tests/architecture.py` rewrites the column of imports in docs/architecture.md; a test fails where it is untrue.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports, generated -->\n", "<!-- end of imports -->"

#: Where each product package lies.
PACKAGES = {"meswitch_cli": ROOT / "meswitch_cli", "meswitch_kernels": ROOT / "kernels" / "meswitch_kernels"}


def find_modules() -> dict[str, Path]:
    """The file of every module of the product, by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()


def imports_of(module: str, *, late: bool) -> set[str]:
    """The product's modules that a module imports as it is read; with `late`, those that its functions import too.

    What is imported for types alone does not count, and neither does the top package, which holds the version.
    """
    return set(_imported(_tree(module), late)) - {module, *PACKAGES}


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _imported(node: ast.AST, late: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in MODULES)
        elif isinstance(child, ast.ImportFrom):
            names = {f"{child.module}.{alias.name}" for alias in child.names}
            yield from names & MODULES.keys()
            if child.module in MODULES and not names <= MODULES.keys():
                yield str(child.module)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        elif late or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imported(child, late)


def circles(graph: Mapping[str, Iterable[str]]) -> set[frozenset[str]]:
    """The largest groups of nodes that all reach each other; nodes on no circle are in none."""
    reached = {node: _reach(graph, node) for node in graph}
    return {
        frozenset(other for other in reached[node] if node in reached[other]) for node in graph if node in reached[node]
    }


def _reach(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph[node]
    return found


def part_of(module: str) -> str:
    """What the page calls it by: a folder of `meswitch_cli`, a file beside those, or the kernels' package."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "meswitch_cli" else package


def parts() -> dict[str, set[str]]:
    """The parts that each part imports, in functions too."""
    found: dict[str, set[str]] = {}
    for module in MODULES.keys() - {"meswitch_cli"}:
        own = found.setdefault(part_of(module), set())
        own |= {part_of(other) for other in imports_of(module, late=True)} - {part_of(module)}
    return found


def with_imports(page: str) -> str:
    """The page with its column of imports made anew.

    Raises:
        ValueError: a part of the product has no row.
    """
    imported, told = parts(), set()

    def row(match: re.Match[str]) -> str:
        own = {Path(path).stem for path in re.findall(r"`([^`]+)`", match[1])}
        told.update(own)
        others = sorted(set().union(*(imported.get(part, ()) for part in own)) - own)
        names = ", ".join(f"`{part}`" for part in others) or "nothing of ours"
        return f"| {match[1]} | {match[2]} | {names if own & imported.keys() else ''} |"

    def table(match: re.Match[str]) -> str:
        return re.sub(r"^\| (`.*?) \| (.*) \| .*\|$", row, match[0], flags=re.MULTILINE)

    page = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", table, page, flags=re.DOTALL)
    if missing := sorted(imported.keys() - told):
        raise ValueError(f"{PAGE}: {', '.join(missing)}: no row of the table tells what it is")
    return page


if __name__ == "__main__":
    PAGE.write_text(with_imports(PAGE.read_text()))
