"""What follows from a few rules about things: forwards from what holds, backwards from what does not.

From "if wet then cold" and "wet" follows "cold"; from "not cold" follows "not wet"; from "cold" nothing follows about
"wet". Every item has one chain of rules that the fact enters somewhere inside and rules that do not touch it. A
template is the sign of the fact, where it enters the chain, and the order in which the rules are written.
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


def candidates(seed: int, count: int = 12000) -> list[Item]:
    random = Random(f"deductions {seed}")
    return [_deduction(random) for _ in range(count)]


def outcome(item: Mapping[str, str], text: str) -> str:
    """The consequences in their order: what stands after "so" in each line, or the text as it is."""
    found = re.findall(r"\bso ((?:not )?\w+)", text)
    return ", ".join(found)


def _deduction(random: Random) -> Item:
    length = random.choice(_RULES_OF_CHAIN)
    words = random.sample(_PROPERTIES, length + 1 + 2 * _OTHER_RULES)
    chain, others = words[: length + 1], words[length + 1 :]
    rules = [*pairwise(chain), *zip(others[::2], others[1::2], strict=True)]
    order = random.sample(range(len(rules)), len(rules))
    holds = random.random() < 0.5
    # The fact has a rule on either side, and two consequences or more.
    place = random.randint(1, length - 2) if holds else random.randint(2, length - 1)
    consequences = chain[place + 1 :] if holds else chain[:place][::-1]
    prefix = "" if holds else "not "
    name = random.choice(_NAMES)
    stated = " ".join(f"If {rules[index][0]} then {rules[index][1]}." for index in order)
    prompt = f"{stated} {name} is {prefix}{chain[place]}. What follows?"
    steps = [chain[place], *consequences]
    response = "\n".join(f"{prefix}{before} so {prefix}{after}" for before, after in pairwise(steps))
    answer = ", ".join(f"{prefix}{word}" for word in consequences)
    form = f"{'holds' if holds else 'fails'} {place} {''.join(map(str, order))}"
    return Item("deductions", f"deductions:{form}", prompt, response, answer)
