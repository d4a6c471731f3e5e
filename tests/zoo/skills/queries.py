"""Requests in English about one small table, answered by an SQL query that is run.

What counts is what the query returns from the table's rows, in their order where the request asks for one; another
query with the same rows is as right. A template is the request's form: what is asked, which conditions hold, in which
order the rows come. The parts share no form and no table.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping
from functools import cache
from itertools import product
from random import Random

from ..item import Item
from ..split import deal_templates
from .tables import TABLES, Table, rows

_MAX_STEPS = 1_000_000
_FUNCTIONS = {"count", "sum", "avg", "min", "max", "total", "abs", "round", "upper", "lower", "length", "like"}
_BY_NAME = {table.name: table for tables in TABLES.values() for table in tables}

_LISTS, _FIGURES = ("one", "two"), ("count", "sum", "average", "highest", "lowest", "groups")
_CONDITIONS = ("over", "under", "between", "is", "not")
_CONDITION_LISTS = [(first,) for first in _CONDITIONS] + [
    (first, joint, second) for first, joint, second in product(_CONDITIONS, ("and", "or"), _CONDITIONS)
]
_FORMS = [
    *product(_LISTS, _CONDITION_LISTS, ("", "up", "down", "top")),
    *product(_FIGURES, _CONDITION_LISTS, ("",)),
]
Form = tuple[str, tuple[str, ...], str]


def candidates(seed: int, count: int = 12000) -> list[Item]:
    random = Random(f"queries {seed}")
    part_of = deal_templates([_template(form) for form in _FORMS], seed)
    items = []
    while len(items) < count:
        form = random.choice(_FORMS)
        table = random.choice(TABLES[part_of[_template(form)]])
        prompt, query = _request(random, table, form)
        answer = _run(table, query, ordered=bool(form[2]))
        # An empty answer would be right by chance.
        if answer not in ("[]", "[[0]]", "[[null]]"):
            items.append(Item("queries", _template(form), prompt, query, answer))
    return items


def outcome(item: Mapping[str, str], text: str) -> str:
    """The rows that the text's first query returns, as JSON; the fault's kind where it does not run."""
    named = re.match(r"Table (\w+)", item["prompt"])
    found = re.search(r"\bselect\b[^;`]*", text, re.IGNORECASE)
    if named is None or found is None:
        return "no query"
    return _run(_BY_NAME[named[1]], found[0], ordered="ORDER BY" in item["response"])


def _template(form: Form) -> str:
    asked, conditions, order = form
    return f"queries:{asked} {' '.join(conditions)} {order}".strip()


def _request(random: Random, table: Table, form: Form) -> tuple[str, str]:
    """(prompt, query)"""
    asked, conditions, order = form
    word, number, several = random.choice([*table.texts]), random.choice([*table.numbers]), table.name
    columns = random.sample(table.columns, 2)
    request, selected = {
        "one": (f"the {columns[0]} of the {several}", columns[0]),
        "two": (f"the {columns[0]} and {columns[1]} of the {several}", f"{columns[0]}, {columns[1]}"),
        "count": (f"the number of {several}", "COUNT(*)"),
        "sum": (f"the total {number} of the {several}", f"SUM({number})"),
        "average": (f"the average {number} of the {several}", f"AVG({number})"),
        "highest": (f"the highest {number} of the {several}", f"MAX({number})"),
        "lowest": (f"the lowest {number} of the {several}", f"MIN({number})"),
        "groups": (f"for each {word} the number of {several}", f"{word}, COUNT(*)"),
    }[asked]
    query = f"SELECT {selected} FROM {several}"
    texts = iter(random.sample([*table.texts], 2))
    numbers = iter(random.sample([*table.numbers], 2))
    asks, tests = [], []
    for condition in conditions[::2]:
        if condition in ("is", "not"):
            ask, test = _word_condition(random, table, next(texts), condition)
        else:
            ask, test = _number_condition(random, table, next(numbers), condition)
        asks.append(ask)
        tests.append(test)
    joint = conditions[1] if len(conditions) > 1 else ""
    request += f" with {f' {joint} '.join(asks)}"
    query += f" WHERE {f' {joint.upper()} '.join(tests)}"
    if asked == "groups":
        query += f" GROUP BY {word}"
    by = random.choice([*table.numbers])
    most = random.randint(2, 5)
    asked_order, ordering = {
        "": ("", ""),
        "up": (f", sorted by {by}", f" ORDER BY {by}"),
        "down": (f", sorted by {by} from high to low", f" ORDER BY {by} DESC"),
        "top": (f", only the {most} of highest {by}", f" ORDER BY {by} DESC LIMIT {most}"),
    }[order]
    prompt = f"Table {several}({', '.join(table.columns)}). Write SQL: {request}{asked_order}."
    return prompt, query + ordering


def _word_condition(random: Random, table: Table, column: str, condition: str) -> tuple[str, str]:
    value = random.choice(table.texts[column])
    if condition == "is":
        return f"{column} {value}", f"{column} = '{value}'"
    return f"{column} other than {value}", f"{column} != '{value}'"


def _number_condition(random: Random, table: Table, column: str, condition: str) -> tuple[str, str]:
    low, high = sorted(random.sample(range(*table.numbers[column]), 2))
    if condition == "over":
        return f"{column} over {low}", f"{column} > {low}"
    if condition == "under":
        return f"{column} under {high}", f"{column} < {high}"
    return f"{column} from {low} to {high}", f"{column} BETWEEN {low} AND {high}"


def _run(table: Table, query: str, ordered: bool) -> str:
    try:
        found = _database(table).execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning) as error:
        return type(error).__name__
    return json.dumps(found if ordered else sorted(found, key=repr), default=repr)


@cache
def _database(table: Table) -> sqlite3.Connection:
    """The table in memory. A model writes the queries: they may read it, and not for ever."""
    connection = sqlite3.connect(":memory:")
    marks = ", ".join("?" * len(table.columns))
    connection.execute(f"CREATE TABLE {table.name} ({', '.join(table.columns)})")
    connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows(table))
    connection.commit()
    connection.set_authorizer(_authorize)
    connection.set_progress_handler(lambda: 1, _MAX_STEPS)
    return connection


def _authorize(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    allowed = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ) or (
        action == sqlite3.SQLITE_FUNCTION and name in _FUNCTIONS
    )
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY
