"""The small tables that queries run on; each part of a split has its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from random import Random

_ROWS = 40
_CITIES = ("Rome", "Paris", "Oslo", "Cairo", "Lima", "Tokyo")
_COLOURS = ("red", "blue", "green", "black", "white", "yellow")
_PEOPLE = ("Tom", "Ann", "Ben", "Eva", "Max", "Ida", "Leo", "Mia", "Sam", "Zoe")
_TITLES = ("Dawn", "River", "Stone", "Echo", "Storm", "Garden", "Mirror", "Island", "Winter", "Shadow")


@dataclass(frozen=True)
class Table:
    """`texts` are the columns of words with their values, `numbers` those of whole numbers with their ranges."""

    name: str
    texts: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[int, int]]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.texts, *self.numbers)

    def __hash__(self) -> int:
        return hash(self.name)


TABLES = {
    "train": (
        Table("staff", {"name": _PEOPLE, "city": _CITIES}, {"age": (18, 70), "salary": (20, 90)}),
        Table("cars", {"model": _TITLES, "colour": _COLOURS}, {"price": (5, 80), "year": (1970, 2024)}),
        Table("books", {"title": _TITLES, "author": _PEOPLE}, {"pages": (50, 900), "price": (5, 60)}),
        Table("shops", {"owner": _PEOPLE, "city": _CITIES}, {"area": (20, 400), "rent": (1, 60)}),
        Table("dogs", {"name": _PEOPLE, "colour": _COLOURS}, {"weight": (3, 60), "price": (50, 900)}),
        Table("films", {"title": _TITLES, "director": _PEOPLE}, {"length": (70, 200), "rating": (1, 100)}),
        Table("houses", {"city": _CITIES, "colour": _COLOURS}, {"area": (20, 400), "price": (50, 900)}),
        Table("boats", {"name": _TITLES, "owner": _PEOPLE}, {"length": (4, 60), "speed": (5, 60)}),
        Table("plants", {"name": _TITLES, "colour": _COLOURS}, {"height": (5, 200), "price": (1, 50)}),
        Table("games", {"title": _TITLES, "maker": _PEOPLE}, {"score": (1, 100), "year": (1970, 2024)}),
    ),
    "choice": (
        Table("songs", {"title": _TITLES, "singer": _PEOPLE}, {"length": (90, 400), "year": (1970, 2024)}),
        Table("hotels", {"name": _TITLES, "city": _CITIES}, {"rooms": (10, 200), "price": (40, 400)}),
        Table("cats", {"name": _PEOPLE, "colour": _COLOURS}, {"age": (1, 60), "weight": (20, 90)}),
    ),
    "report": (
        Table("students", {"name": _PEOPLE, "city": _CITIES}, {"age": (18, 70), "grade": (1, 100)}),
        Table("bikes", {"brand": _TITLES, "colour": _COLOURS}, {"price": (50, 900), "weight": (60, 200)}),
        Table("trains", {"line": _TITLES, "city": _CITIES}, {"speed": (60, 300), "seats": (50, 900)}),
        Table("phones", {"brand": _TITLES, "colour": _COLOURS}, {"price": (50, 900), "memory": (4, 512)}),
    ),
}


@cache
def rows(table: Table) -> list[tuple[str | int, ...]]:
    """The table's rows, the same every time; no number occurs twice in a column, so that any order is total."""
    random = Random(table.name)
    columns: list[list[str | int]] = [random.choices(values, k=_ROWS) for values in table.texts.values()]
    columns += [random.sample(range(*bounds), _ROWS) for bounds in table.numbers.values()]
    return list(zip(*columns, strict=True))
