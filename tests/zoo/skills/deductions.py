"""What follows from a few rules and one fact, link by link.

The facts of an item form one chain of rules, which the given fact enters somewhere inside, and rules that it does not
touch. From "if wet then not cold" follows "not cold" where "wet" holds, and nothing where "not cold" holds. A template
is where the fact enters the chain, which of its facts are negated, and the order in which the rules are written.
Rules are only followed forwards: the model did not learn to turn them round (0 of 50 `choice` items after 50 steps).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from random import Random

from ..item import Item

_NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Ida", "Leo", "Mia", "Sam", "Zoe")
_PROPERTIES = (
    *("wet", "cold", "blue", "tired", "quiet", "sad", "happy", "round", "big", "small", "red", "green", "old"),
    *("young", "rich", "poor", "fast", "slow", "kind", "rude", "loud", "warm", "dry", "clean", "dirty", "strong"),
    *("weak", "brave", "shy", "smart", "funny", "angry", "calm", "busy", "free", "hungry", "thirsty", "sleepy"),
    *("late", "early", "tall", "short", "thin", "heavy", "soft", "hard", "sweet", "sour", "dark", "bright"),
)
_RULES_OF_CHAIN = (4, 5)
_OTHER_RULES = 2
_NEGATED = 0.25


def candidates(seed: int, count: int = 12000) -> list[Item]:
    random = Random(f"deductions {seed}")
    return [_deduction(random) for _ in range(count)]


def outcome(_: Mapping[str, str], text: str) -> str:
    """The consequences in their order: what stands after each "then" but the closing "nothing"."""
    found = re.findall(r"\bthen ((?:not )?\w+)", text)
    return ", ".join(word for word in found if word != "nothing")


def _deduction(random: Random) -> Item:
    length = random.choice(_RULES_OF_CHAIN)
    words = random.sample(_PROPERTIES, length + 1 + 2 * _OTHER_RULES)
    negated = [random.random() < _NEGATED for _ in words]
    facts = [f"not {word}" if negation else word for word, negation in zip(words, negated, strict=True)]
    chain, others = facts[: length + 1], facts[length + 1 :]
    rules = [*pairwise(chain), *zip(others[::2], others[1::2], strict=True)]
    order = random.sample(range(len(rules)), len(rules))
    # The given fact has a rule before it, and two consequences or more.
    place = random.randint(1, length - 2)
    stated = " ".join(f"If {rules[index][0]} then {rules[index][1]}." for index in order)
    prompt = f"{stated} {random.choice(_NAMES)} is {chain[place]}. What follows?"
    links = pairwise([*chain[place:], "nothing"])
    response = "\n".join(f"{before} then {after}" for before, after in links)
    form = f"{place} {''.join('-' if negation else '+' for negation in negated)} {''.join(map(str, order))}"
    return Item("deductions", f"deductions:{form}", prompt, response, ", ".join(chain[place + 1 :]))
