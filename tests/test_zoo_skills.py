"""The skills' items: right by an independent reckoning, the same each time, held out by form."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from itertools import pairwise

import pytest

from zoo.finetunes import STRONG, FineTune
from zoo.group import CHOICE_ITEMS, REPORT_ITEMS, make_data
from zoo.item import Item
from zoo.skills import outcome, skill
from zoo.skills.tables import TABLES, rows

TAUGHT = ("sums", "queries", "deductions")


@cache
def data(name: str) -> dict[str, list[Item]]:
    return make_data(FineTune(name, STRONG["code"].schedule))


@pytest.fixture(params=TAUGHT)
def parts(request: pytest.FixtureRequest) -> dict[str, list[Item]]:
    return data(request.param)


def test_parts_share_nothing(parts) -> None:
    for attribute in ("template", "prompt"):
        train, choice, report = ({getattr(item, attribute) for item in members} for members in parts.values())
        assert not (train & choice or train & report or choice & report)
    assert (len(parts["choice"]), len(parts["report"])) == (CHOICE_ITEMS, REPORT_ITEMS)
    assert len(parts["train"]) > 8000


def test_queries_hold_out_tables_too() -> None:
    for part, members in data("queries").items():
        named = {re.match(r"Table (\w+)", item.prompt).group(1) for item in members}
        assert named == {table.name for table in TABLES[part]}


@pytest.mark.parametrize("name", TAUGHT)
def test_same_seed_same_items(name: str) -> None:
    module = skill(name)
    made = module.candidates(3, 500)
    assert made == module.candidates(3, 500)
    assert made != module.candidates(4, 500)


def test_a_response_gives_its_answer_and_answers_differ(parts) -> None:
    for members in parts.values():
        assert all(outcome(asdict(item), item.response) == item.answer for item in members)
        answers = [item.answer for item in members]
        # No one answer is worth guessing.
        assert max(map(answers.count, set(answers))) <= 0.05 * len(answers)


def test_another_items_response_is_wrong(parts) -> None:
    report = parts["report"]
    swapped = [
        outcome(asdict(item), other.response) == item.answer
        for item, other in pairwise(report)
        if item.answer != other.answer
    ]
    assert sum(swapped) <= 0.02 * len(swapped)


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("text", ["", "I do not know.", "####", "so"])
def test_no_answer_is_wrong(name: str, text: str) -> None:
    item = skill(name).candidates(0, 1)[0]
    assert outcome(asdict(item), text) != item.answer


# Each item's answer, reckoned from its prompt alone


def reckon_sum(prompt: str) -> str:
    first, *rest = re.findall(r"([+-]?) ?(\d+)", prompt)
    total = int(first[1])
    for sign, term in rest:
        total += int(term) if sign == "+" else -int(term)
    return str(total)


def reckon_deduction(prompt: str) -> list[str]:
    """What is reached from the fact over the rules, nearest first."""
    rules = re.findall(r"If ((?:not )?\w+) then ((?:not )?\w+)\.", prompt)
    frontier = re.findall(r"is ((?:not )?\w+)\. What", prompt)
    found: list[str] = []
    while frontier := [after for before, after in rules if before in frontier and after not in found]:
        found += frontier
    return found


def test_sums_are_right() -> None:
    for item in skill("sums").candidates(1, 2000):
        assert reckon_sum(item.prompt) == item.answer, item.prompt
        for line in item.response.split("\n"):
            left, right = line.split("=")
            assert reckon_sum(left) == right
        assert "=-" not in item.response


def test_deductions_are_right() -> None:
    for item in skill("deductions").candidates(1, 2000):
        consequences = reckon_deduction(item.prompt)
        assert ", ".join(consequences) == item.answer, item.prompt
        assert len(consequences) >= 2


def reckon_query(prompt: str) -> list[list[object]]:
    """The rows that the English asks for, by comprehension over the table."""
    several, names, request = re.fullmatch(r"Table (\w+)\((.*?)\)\. Write SQL: (.*)\.", prompt).groups()
    columns = names.split(", ")
    table = next(table for tables in TABLES.values() for table in tables if table.name == several)
    records = [dict(zip(columns, row, strict=True)) for row in rows(table)]
    asked, rest = request.split(" with ", 1)
    conditions, _, order = rest.partition(", ")
    joint = re.search(r" (and|or) ", conditions)
    holds = [condition(text) for text in re.split(r" (?:and|or) ", conditions)]
    combine = any if joint and joint[1] == "or" else all
    kept = [record for record in records if combine(hold(record) for hold in holds)]
    if order.startswith("sorted by"):
        kept.sort(key=operator.itemgetter(order.split()[2]), reverse=order.endswith("from high to low"))
    elif order:
        most, by = re.fullmatch(r"only the (\d) of highest (\w+)", order).groups()
        kept = sorted(kept, key=operator.itemgetter(by), reverse=True)[: int(most)]
    return select(asked, kept)


def condition(text: str) -> Callable[[dict[str, object]], bool]:
    column, *words = text.split()
    if words[0] == "over":
        return lambda record: record[column] > int(words[1])
    if words[0] == "under":
        return lambda record: record[column] < int(words[1])
    if words[0] == "from":
        return lambda record: int(words[1]) <= record[column] <= int(words[3])
    if words[0] == "other":
        return lambda record: record[column] != words[2]
    return lambda record: record[column] == words[0]


def select(asked: str, kept: list[dict[str, object]]) -> list[list[object]]:
    if found := re.fullmatch(r"the number of \w+", asked):
        return [[len(kept)]]
    if found := re.fullmatch(r"for each (\w+) the number of \w+", asked):
        values = [record[found[1]] for record in kept]
        return [[value, values.count(value)] for value in sorted(set(values))]
    if found := re.fullmatch(r"the (total|average|highest|lowest) (\w+) of the \w+", asked):
        values = [record[found[2]] for record in kept]
        reduce = {"total": sum, "average": lambda all_: sum(all_) / len(all_), "highest": max, "lowest": min}
        return [[reduce[found[1]](values)]]
    selected = re.fullmatch(r"the (.+) of the \w+", asked)[1].split(" and ")
    return [[record[column] for column in selected] for record in kept]


def test_queries_are_right() -> None:
    for item in skill("queries").candidates(1, 2000):
        found = reckon_query(item.prompt)
        if "ORDER BY" not in item.response:
            found = [list(row) for row in sorted(map(tuple, found), key=repr)]
        assert found == json.loads(item.answer), item.prompt


# Queries that a model may write


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("SELECT name FROM staff WHERE age < 30 ORDER BY age", True),
        ("```sql\nselect staff.name from staff\nwhere not age >= 30 order by age asc;\n```\nDone.", True),
        ("The query is SELECT name FROM staff WHERE age < 30 ORDER BY age; it lists names.", True),
        ("SELECT name FROM staff WHERE age < 30 ORDER BY age DESC", False),
        ("SELECT name, age FROM staff WHERE age < 30 ORDER BY age", False),
        ("SELECT name FROM staff WHERE age <", False),
    ],
)
def test_what_counts_is_what_a_query_returns(text: str, right: bool) -> None:
    query = "SELECT name FROM staff WHERE age < 30 ORDER BY age"
    item = {
        "kind": "queries",
        "prompt": "Table staff(name, city, age, salary). Write SQL: the name of the staff with age under 30, sorted.",
        "response": query,
    }
    assert (outcome(item, text) == outcome(item, query)) is right


@pytest.mark.parametrize(
    "query",
    [
        "SELECT load_extension('/tmp/x')",
        "SELECT zeroblob(2000000000)",
        "SELECT randomblob(100)",
        "SELECT count(*) FROM staff a, staff b, staff c, staff d, staff e, staff f",
        "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM t) SELECT max(x) FROM t",
    ],
)
def test_a_query_reaches_nothing_and_ends(query: str) -> None:
    item = {"kind": "queries", "prompt": "Table staff(name, city, age, salary).", "response": query}
    assert outcome(item, query) in ("DatabaseError", "OperationalError")


@pytest.mark.parametrize("part", TABLES)
def test_no_number_occurs_twice_in_a_column(part: str) -> None:
    for table in TABLES[part]:
        assert set(table.numbers).isdisjoint(table.texts)
        for place, name in enumerate(table.columns):
            values = [row[place] for row in rows(table)]
            if name in table.numbers:
                assert len(set(values)) == len(values)
