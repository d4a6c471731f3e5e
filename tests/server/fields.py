"""What the tests' router tells apart: three fields, one of each expert, by their words."""

from __future__ import annotations

import hashlib
import itertools

FIELDS = {
    "red": ("apples", "add", "subtract", "total", "price", "coins", "sum", "dozen"),
    "green": ("python", "function", "loop", "compile", "string", "list", "class", "return"),
    "blue": ("knight", "knave", "lies", "truth", "premise", "implies", "false", "puzzle"),
}


def prompts(field: str, count: int) -> list[str]:
    """Four of the field's words each, no two alike; the router learns from the first 56."""
    every = itertools.combinations(FIELDS[field], 4)
    return [" ".join(words) for words in sorted(every, key=lambda words: hash_of(" ".join(words)))][:count]


def hash_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
