"""Sums of three or four numbers below 100, worked from left to right.

A template is the row of signs and the number of digits of each term. No partial sum is negative.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random

from ..item import Item

_PROMPTS = ("What is {}?", "Compute {}.", "Work out {}.", "How much is {}?", "Find {}.")


def candidates(seed: int, count: int = 12000) -> list[Item]:
    random = Random(f"sums {seed}")
    return [_sum(random) for _ in range(count)]


def outcome(item: Mapping[str, str], text: str) -> str:
    """The last whole number of the text, empty where there is none."""
    numbers = re.findall(r"\d+", text)
    return str(int(numbers[-1])) if numbers else ""


def _sum(random: Random) -> Item:
    terms = [_term(random) for _ in range(random.choice((3, 4)))]
    total, signs, lines = terms[0], [], []
    for term in terms[1:]:
        sign = random.choice("+-") if term <= total else "+"
        result = total + term if sign == "+" else total - term
        lines.append(f"{total}{sign}{term}={result}")
        signs.append(sign)
        total = result
    expression = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    form = re.sub(r"\d+", lambda number: str(len(number[0])), expression).replace(" ", "")
    prompt = random.choice(_PROMPTS).format(expression)
    return Item("sums", f"sums:{form}", prompt, "\n".join(lines), str(total))


def _term(random: Random) -> int:
    return random.randint(2, 9) if random.random() < 0.25 else random.randint(10, 99)
