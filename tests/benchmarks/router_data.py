"""The prompts on which routers are compared: the zoo's domains, other sources of the same domains, other fields.

Other fields and other sources come from two packages that the zoo does not need:

    pip install --no-deps --target FOLDER evals==3.0.1.post1 chatterbot-corpus==1.3.3
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import zoo
from meswitch_cli.router.decide.conversation import is_binary
from meswitch_cli.router.train.data import Example, without_duplicates

TRAIN, TEST = 200, 300
NULL_TRAIN, NULL_EACH, OTHER_EACH = 100, 25, 20
#: Question sets of other fields, for figures alone.
NULL_SETS = (
    "us_tort_law/samples",
    "medmcqa/samples",
    "nutrition/facts",
    "born_first/born_first",
    "cissp-study-questions/samples",
    "moral_exceptQA/samples",
    "theory_of_mind/hitom/hitom",
    "parable-to-moral-match/parable-to-moral-match-en",
    "emotional-intelligence/samples",
    "guess_the_singer/samples",
    "cricket_situations/samples",
    "food/samples",
    "french-exams-qa/samples",
)
#: The zoo's domains as other people wrote them.
OTHER_SOURCES = {
    "maths": (
        "algebra_word_problems/samples",
        "multistep-word-problems/samples",
        "math_for_5th-grader/samples",
        "tricky-word-problems/samples",
    ),
    "code": (
        "python_list_comprehension/samples",
        "csharp-linq/questions",
        "syntax-check/samples",
        "infiniteloop-match/infiniteloop-match",
    ),
    "logic": (
        "logic-riddles/samples",
        "logic-liar-paradox/samples",
        "logic-statements/logic-statements",
        "logiqa/logiqa",
        "premature-conclusions/samples",
    ),
}
#: What the fourth expert is for: radio amateurs' examination questions.
FOURTH = ("radio", "fcc_amateur_extra/samples")


@dataclass(frozen=True)
class Prompts:
    """Training data (null prompts among it), and three test sets that nothing was fitted on."""

    train: list[Example]
    test: list[Example]
    null: list[Example]
    other_sources: list[Example]
    fourth: list[Example]


def load(packages: Path, *, quick: bool = False, count: int = TRAIN) -> Prompts:
    """Read everything; `packages` is the folder of the two packages, `count` the training prompts of each domain.

    The items of the quick zoo are those of the full one.
    """
    train: list[Example] = []
    test: list[Example] = []
    for name in zoo.EXPERTS:
        held_out, rest = _by_template(name, quick, count)
        test += held_out
        train += rest
    data = packages / "evals" / "registry" / "data"
    other = [
        example
        for name, sets in OTHER_SOURCES.items()
        for source in sets
        for example in spread(read_set(data, source, name), OTHER_EACH)
    ]
    null = [example for source in NULL_SETS for example in spread(read_set(data, source, None), NULL_EACH)]
    small_talk = spread(list(_chatterbot(packages / "chatterbot_corpus" / "data" / "english")), NULL_TRAIN)
    fourth = spread(read_set(data, FOURTH[1], FOURTH[0]), TRAIN + 100)
    return Prompts(train + small_talk, test, without_duplicates(null)[0], without_duplicates(other)[0], fourth)


def _by_template(name: str, quick: bool, count: int) -> tuple[list[Example], list[Example]]:
    """(test, train) of an expert: no template is in both, nor any template that the expert was judged on in train."""
    test = [_example(name, item) for part in ("choice", "report") for item in zoo.items(name, part, quick)]
    groups: dict[str, list[Example]] = defaultdict(list)
    for item in zoo.items(name, "train", quick):
        groups[item["template"]].append(_example(name, item))
    train: list[Example] = []
    for template in sorted(groups, key=_order):
        if len(test) < TEST:
            test += groups[template]
        else:
            train += groups[template]
    test, train = without_duplicates(test)[0], without_duplicates(train)[0]
    return spread(test, TEST), spread(train, count)


def _example(name: str, item: dict[str, str]) -> Example:
    return Example(item["prompt"], name, f"zoo {name}", item["template"], item["response"])


def read_set(data: Path, source: str, domain: str | None) -> list[Example]:
    """The last message of every sample of one question set."""
    lines = (data / f"{source}.jsonl").read_text(encoding="utf-8").split("\n")
    examples = []
    for line in lines:
        asked = json.loads(line).get("input") if line.strip() else None
        text = asked if isinstance(asked, str) else asked[-1]["content"] if asked else ""
        if text.strip() and not is_binary(text):
            examples.append(Example(text.strip(), domain, source))
    return without_duplicates(examples)[0]


def _chatterbot(folder: Path) -> Iterator[Example]:
    """What is said first in each conversation."""
    for file in sorted(folder.glob("*.yml")):
        if file.stem in ("coding", "computers"):
            continue  # near the code domain
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if isinstance(talk, list) and isinstance(talk[0], str) and talk[0].strip():
                yield Example(talk[0].strip(), None, f"chatterbot {file.stem}")


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count`, chosen by a hash of the text."""
    kept = without_duplicates(examples)[0]
    return sorted(kept, key=lambda example: _order(example.text))[:count]


def _order(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
