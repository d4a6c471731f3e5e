"""Whether a prompt that says the same in other words goes to the same expert."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any

import torch

from meswitch_cli.router.decide.backend import FeatureSource
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.train.measures import proportion

#: Prompts that a report rewords.
MOST_REWORDED = 30
#: Characters of the prompt as it was: from, and below.
BANDS = ((0, 80), (80, 200), (200, 500), (500, 1 << 30))
#: One word in so many is mistyped, and one in every prompt.
_WORDS_A_TYPO = 12
_IMPERATIVES = (
    ("what is ", "tell me "),
    ("what are ", "name "),
    ("how many ", "give the number of "),
    ("how do i ", "show me how to "),
    ("why ", "explain why "),
    ("who ", "say who "),
    ("is ", "say whether this is so: is "),
    ("does ", "say whether this is so: does "),
    ("can ", "say whether this is so: can "),
)
_QUESTIONS = (
    ("write ", "can you write "),
    ("explain ", "can you explain "),
    ("find ", "can you find "),
    ("solve ", "can you solve "),
    ("calculate ", "can you calculate "),
    ("show ", "can you show "),
    ("give ", "can you give "),
    ("list ", "can you list "),
)


def lower_case(text: str) -> str:
    return text.lower()


def polite(text: str) -> str:
    return f"Hi, could you please help me with this? {text} Thank you!"


def bare(text: str) -> str:
    """Without the mark at its end."""
    return text.rstrip().rstrip(".?!:")


def mistyped(text: str) -> str:
    """Neighbouring letters inside one word in twelve are swapped; which, the text itself decides."""
    long = [match.span() for match in re.finditer(r"[A-Za-z]{4,}", text)]
    draw = Random(text)
    for start, end in draw.sample(long, min(len(long), 1 + len(text.split()) // _WORDS_A_TYPO)):
        at = draw.randrange(start + 1, end - 2)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text


def turned(text: str) -> str:
    """A question as a request, a request as a question; anything else under a request of its own."""
    for begins, instead in (*_IMPERATIVES, *_QUESTIONS):
        if text.lower().startswith(begins):
            return instead[0].upper() + instead[1:] + text[len(begins) :]
    return f"I have a question. {text}"


REWORDINGS: Mapping[str, Callable[[str], str]] = {
    "lower case": lower_case,
    "polite": polite,
    "no mark at the end": bare,
    "mistyped": mistyped,
    "question or request": turned,
}


def reword(texts: Iterable[str]) -> dict[str, list[str]]:
    """The texts in other words, by rewording."""
    every = list(texts)
    return {name: [change(text) for text in every] for name, change in REWORDINGS.items()}


def measure_rewording(
    model: RouterModel, texts: Sequence[str], original: torch.Tensor, reworded: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """How often the decision stays, by rewording and by the prompt's length; a prompt that falls back is to stay back.

    Args:
        original: features `[n, d]` of the texts as they are; reworded: of them in other words, by rewording.
    """
    went = _decisions(model, original)
    same = {
        name: [mine == theirs for mine, theirs in zip(went, _decisions(model, features), strict=True)]
        for name, features in reworded.items()
    }
    bands = {
        f"{low} to {high}" if high < BANDS[-1][1] else f"{low} and more": [low <= len(text) < high for text in texts]
        for low, high in BANDS
    }
    return {
        "prompts": len(texts),
        "same": _share(item for stays in same.values() for item in stays),
        "by_rewording": {name: _share(stays) for name, stays in same.items()},
        "by_length": {
            band: _share(item for stays in same.values() for item, within in zip(stays, inside, strict=True) if within)
            for band, inside in bands.items()
            if any(inside)
        },
    }


def rewording_figures(backend: FeatureSource, model: RouterModel, texts: Sequence[str]) -> dict[str, Any]:
    """`measure_rewording` of at most `MOST_REWORDED` texts, taken at even steps."""
    step = -(-len(texts) // MOST_REWORDED)
    taken = list(texts[:: max(1, step)])
    reworded = {name: backend.features(changed) for name, changed in reword(taken).items()}
    return measure_rewording(model, taken, backend.features(taken), reworded)


def _decisions(model: RouterModel, features: torch.Tensor) -> list[str | None]:
    return [item.label if item.verdict == "routed" else None for item in model.judge(features)]


def _share(stays: Iterable[bool]) -> dict[str, Any]:
    found = list(stays)
    return proportion(sum(found), len(found))
