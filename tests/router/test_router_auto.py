"""Experts without prompts: their cards and their fields."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from meswitch_cli import compress
from meswitch_cli.errors import RouterError
from meswitch_cli.router.train.auto import examples_from_card
from meswitch_cli.router.train.data import gather, read_examples
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import train_router
from zoo.tiny import make_pair

from .conftest import write_lines

CARD = """---
license: mit
tags: [medical, text-generation]
widget:
- text: Which dose of paracetamol may a child of 20 kg have?
- {text: 3}
---
# A nurse in your pocket
"""


def fields(name: str, folder: Path) -> Counter[str]:
    found = examples_from_card(name, folder)
    assert {item.domain for item in found} == {name}
    return Counter(item.where.split(": ")[2] if "general.json" in item.where else "card" for item in found)


def test_a_name_or_a_card_says_the_field(tmp_path: Path) -> None:
    assert set(fields("maths", tmp_path)) == {"mathematics"}
    assert set(fields("python-coder", tmp_path)) == {"programming"}
    (tmp_path / "README.md").write_text(CARD)
    assert set(fields("helper", tmp_path)) == {"medicine and health", "card"}
    texts = [item.text for item in examples_from_card("helper", tmp_path)]
    assert "Which dose of paracetamol may a child of 20 kg have?" in texts


def test_an_artifacts_card_says_nothing_by_itself(tmp_path: Path) -> None:
    """Its tag `delta-compression` is no word of computer science, and its base's name is not the expert's."""
    base, tuned = make_pair(tmp_path)
    made = compress(base.rename(tmp_path / "coder"), tuned.rename(tmp_path / "tuned"), tmp_path / "art", bits=4)
    assert "against coder" in (made.path / "README.md").read_text()
    assert set(fields("maths", made.path)) == {"mathematics"}


def test_what_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="give some: --expert xyz=FILE"):
        examples_from_card("xyz", tmp_path)
    (tmp_path / "README.md").write_text("---\n{[\n---\n")
    with pytest.raises(RouterError, match="front matter is not valid YAML"):
        examples_from_card("xyz", tmp_path)
    (tmp_path / "README.md").write_bytes(b"x" * (2 << 20))
    with pytest.raises(RouterError, match="larger than a model card"):
        examples_from_card("xyz", tmp_path)


def test_a_router_of_cards_alone(tmp_path: Path) -> None:
    examples = [item for name in ("maths", "law", "cooking") for item in examples_from_card(name, tmp_path)]
    router = train_router(gather(examples), TrainingSettings(backend="tfidf")).router
    assert router.labels == ("cooking", "law", "maths")
    assert router.route("What is 12 * 12 - 7?", gate="off").expert == "maths"


def test_calibration_data_are_prompts_too(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "calibration.jsonl", [{"text": "A court " * 500}, {"prompt": "x", "response": "y"}])
    found = read_examples(file, domain="law")
    assert [len(item.text) for item in found] == [1000 - 1, 1] and {item.domain for item in found} == {"law"}
