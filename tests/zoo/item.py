"""One question with its full target response: a line of every JSONL file of the zoo."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """`template` names what the item was made from: the parts of a split share none.

    `answer` is what exact match compares (`extract_answer(response) == answer`); empty where there is none.
    """

    kind: str
    template: str
    prompt: str
    response: str
    answer: str


def extract_answer(text: str) -> str:
    """What follows the last `####`, or the whole text where there is none."""
    return text.rsplit("####", 1)[-1].strip()


def write_items(path: Path, items: Iterable[Item]) -> None:
    lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_items(path: Path) -> list[dict[str, str]]:
    # Not splitlines: texts may hold the other line separators of Unicode.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
