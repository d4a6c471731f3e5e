"""The router's rooms, in order: none imports a later one, and no two files import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import meswitch_cli.router

ROOMS = ("decide", "backends", "store", "train")
FOLDER = Path(meswitch_cli.router.__file__).parent
PREFIX = "meswitch_cli.router."


def imports(path: Path) -> set[str]:
    """The router's modules that a file imports, late ones and those for types alone too, as "room" or "room.file"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PREFIX):
            inside = str(node.module).removeprefix(PREFIX)
            files = {f"{inside}.{name.name}" for name in node.names if (FOLDER / inside / f"{name.name}.py").is_file()}
            found |= files or {inside}
    return found


def test_no_room_imports_a_later_one() -> None:
    arrows = {
        (room, target.partition(".")[0])
        for room in ROOMS
        for path in (FOLDER / room).glob("*.py")
        for target in imports(path)
    }
    assert {target for _, target in arrows} == set(ROOMS)
    assert [arrow for arrow in arrows if ROOMS.index(arrow[1]) > ROOMS.index(arrow[0])] == []


def test_no_file_imports_itself_through_others() -> None:
    graph = {
        f"{path.parent.name}.{path.stem}": imports(path) for room in ROOMS for path in (FOLDER / room).glob("*.py")
    }
    graph = {name: {item if item in graph else f"{item}.__init__" for item in wanted} for name, wanted in graph.items()}
    while leaves := [name for name, wanted in graph.items() if not wanted & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"a circle among {sorted(graph)}"
