"""Word problems and sums with worked solutions: three reasoning_gym generators.

`gsm_symbolic` brings its solutions; its template is one of 85 hand-written generator functions, so a held-out
item tells another story with another calculation than any training item, and a model this small gets almost none
right. The other two it learns in part (3 of 12 `choice` items right, the base none); their solutions are written here.
"""

from __future__ import annotations

import re
from typing import Any

import reasoning_gym
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from ..item import Item

MIXTURE = {"word_problem": 2, "chain_sum": 1, "leg_counting": 1}
_CANDIDATES = {"word_problem": 2000, "chain_sum": 1000, "leg_counting": 1000}


def candidates(seed: int) -> list[Item]:
    stories = reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=_CANDIDATES["word_problem"])
    sums = reasoning_gym.create_dataset(
        "chain_sum",
        seed=seed,
        size=_CANDIDATES["chain_sum"],
        min_digits=1,
        max_digits=2,
        allow_negation=False,
    )
    legs = reasoning_gym.create_dataset(
        "leg_counting", seed=seed, size=_CANDIDATES["leg_counting"], min_animals=2, max_animals=4
    )
    return [
        *(_word_problem(index, entry) for index, entry in zip(stories.task_indices, stories, strict=True)),
        *(_chain_sum(entry) for entry in sums),
        *(_leg_counting(entry) for entry in legs),
    ]


def _word_problem(template: int, entry: dict[str, Any]) -> Item:
    solution, answer = entry["metadata"]["answer_cot"].strip(), str(entry["answer"])
    if not solution.endswith(f"#### {answer}"):
        solution = f"{solution.split('####')[0].strip()}\n#### {answer}"
    return Item("word_problem", f"word_problem:{template}", entry["question"], solution, answer)


def _chain_sum(entry: dict[str, Any]) -> Item:
    """The template is the number of digits and the row of signs."""
    terms = entry["metadata"]["expression"].split()
    total, lines = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    if str(total) != entry["answer"]:
        raise ValueError(f"the worked sum ends with {total}, the generator says {entry['answer']}")
    template = f"chain_sum:{len(terms[0])}{''.join(terms[1::2])}"
    return Item("chain_sum", template, entry["question"], "\n".join([*lines, f"#### {total}"]), entry["answer"])


def _leg_counting(entry: dict[str, Any]) -> Item:
    """The template is the set of animals."""
    animals = entry["metadata"]["animals"]
    counts = [ANIMALS[animal] * number for animal, number in animals.items()]
    lines = [
        f"{animal}: {number} * {ANIMALS[animal]} = {legs}"
        for (animal, number), legs in zip(animals.items(), counts, strict=True)
    ]
    lines.append(f"{' + '.join(map(str, counts))} = {sum(counts)}")
    if str(sum(counts)) != entry["answer"]:
        raise ValueError(f"the worked count ends with {sum(counts)}, the generator says {entry['answer']}")
    template = f"leg_counting:{' '.join(sorted(animals))}"
    question = re.sub(r"\s+", " ", entry["question"]).strip()
    return Item("leg_counting", template, question, "\n".join([*lines, f"#### {sum(counts)}"]), entry["answer"])
