"""The product's files import each other in one direction, its classes have names of their own, its page is true."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

import pytest
from architecture import MODULES, PAGE, circles, imports_of, parts, with_imports


def test_circles_are_found() -> None:
    graph = {"a": ["b"], "b": ["c"], "c": ["b"], "d": ["d", "a"], "e": []}
    assert circles(graph) == {frozenset("bc"), frozenset("d")}


def test_no_files_import_each_other() -> None:
    assert circles({module: imports_of(module, late=False) for module in MODULES}) == set()


def test_no_files_import_each_other_in_functions() -> None:
    assert circles({module: imports_of(module, late=True) for module in MODULES}) == set()


def test_no_folders_import_each_other() -> None:
    assert circles(parts()) == set()


def test_the_page_tells_who_imports_whom() -> None:
    page = PAGE.read_text()
    assert with_imports(page) == page, "run: python tests/architecture.py"


def test_a_part_without_a_row_is_an_error() -> None:
    page = "".join(line for line in PAGE.read_text().splitlines(keepends=True) if "`meswitch_cli/delta/`" not in line)
    with pytest.raises(ValueError, match="delta: no row"):
        with_imports(page)


@pytest.mark.parametrize("walk_of", ["One weight", "One request"])
def test_the_walks_lead_through_what_is_there(walk_of: str) -> None:
    walk = PAGE.read_text().partition(f"### {walk_of}\n")[2].partition("\n##")[0]
    stops = re.findall(r"`(?:\w+/)*(\w+\.py): ([\w.]+)`", walk)
    assert len(stops) > 12
    for file, name in stops:
        found = {
            node.name
            for path in MODULES.values()
            if path.name == file
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert set(name.split(".")) <= found, f"{file}: {name}"


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        if module.startswith("meswitch_cli"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}
