"""The same prompt in other words."""

from __future__ import annotations

import pytest
import torch

from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.train import rewording
from meswitch_cli.router.train.report import rewording as as_table
from meswitch_cli.router.train.rewording import measure_rewording, reword, rewording_figures

from .conftest import sentences


@pytest.mark.parametrize(
    ("change", "text", "expected"),
    [
        ("lower_case", "What is 7 % of 300?", "what is 7 % of 300?"),
        ("bare", "What is 7 % of 300?", "What is 7 % of 300"),
        ("polite", "Add 2 and 2.", "Hi, could you please help me with this? Add 2 and 2. Thank you!"),
        ("turned", "What is a prime?", "Tell me a prime?"),
        ("turned", "write a loop", "Can you write a loop"),
        ("turned", "2 + 2", "I have a question. 2 + 2"),
        ("mistyped", "2 + 2", "2 + 2"),
    ],
)
def test_rewordings_by_hand(change: str, text: str, expected: str) -> None:
    assert getattr(rewording, change)(text) == expected


def test_a_typo_swaps_letters_inside_a_word_and_is_the_same_every_time() -> None:
    text = "How many apples are in the basket when seven of them have been eaten by somebody who was hungry?"
    changed = rewording.mistyped(text)
    assert changed == rewording.mistyped(text) != text
    before, after = text.split(), changed.split()
    odd = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert 1 <= len(odd) <= 2
    assert all(sorted(old) == sorted(new) and old[0] == new[0] for old, new in odd)


def test_figures_count_decisions_that_stay(tfidf_router: Router) -> None:
    """One rewording changes nothing, the other makes both prompts another expert's."""
    maths, code = (torch.as_tensor(tfidf_router.backend.features(sentences(name, 2))) for name in ("maths", "code"))
    texts = ["short", "x" * 300]
    found = measure_rewording(tfidf_router.model, texts, maths, {"nothing": maths, "all": code})
    assert found["by_rewording"]["nothing"]["value"] == 1 and found["by_rewording"]["all"]["value"] == 0
    assert found["same"]["value"] == 0.5 and found["same"]["prompts"] == 4 and found["prompts"] == 2
    assert {name: item["prompts"] for name, item in found["by_length"].items()} == {"0 to 80": 2, "200 to 500": 2}
    assert "| **all** | 50.0 [" in "\n".join(as_table(found))


def test_a_prompt_that_falls_back_is_to_stay_back(tfidf_router: Router) -> None:
    foreign = tfidf_router.backend.features(["Who wrote Hamlet?"])
    own = tfidf_router.backend.features(sentences("maths", 1))
    found = measure_rewording(tfidf_router.model, ["Who wrote Hamlet?"], foreign, {"same": foreign, "other": own})
    assert found["by_rewording"]["same"]["value"] == 1 and found["by_rewording"]["other"]["value"] == 0


def test_of_many_prompts_some_are_reworded(tfidf_router: Router) -> None:
    texts = sentences("maths", 100, seed=2)
    found = rewording_figures(tfidf_router.backend, tfidf_router.model, texts)
    assert 20 <= found["prompts"] <= rewording.MOST_REWORDED
    assert set(found["by_rewording"]) == set(reword(["x"]))
    # Words and pairs of words do not know capitals, so these are the same prompts.
    assert found["by_rewording"]["lower case"]["value"] == 1
