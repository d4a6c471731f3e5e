"""Fine-tuning of the lm backend: when it ends, which weights it takes, and that it can be gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from meswitch_cli.router.backends import lm_training
from meswitch_cli.router.backends.lm import LetterModel
from meswitch_cli.router.backends.lm_state import FILE
from meswitch_cli.router.backends.lm_training import Course, Pairs, fine_tune
from meswitch_cli.router.train.settings import TrainingSettings

from .conftest import sentences

LABELS = ("code", "maths")
TRAIN = [(text, label) for label in LABELS for text in sentences(label, 16)]
VALIDATION = [(text, label) for label in LABELS for text in sentences(label, 8, seed=1)]


class Stopped(Exception):
    """Stands for Ctrl-C."""


def trained(
    base: Path, steps: int, validation: Pairs = VALIDATION, kept: Path | None = None, stop_at: int = 0
) -> tuple[Course, dict[str, torch.Tensor]]:
    """How it went, and the weights that it left."""

    def progress(what: str, done: int, total: int) -> None:
        if done == stop_at:
            raise Stopped

    asked = LetterModel(base, LABELS, max_tokens=16, training=True)
    settings = TrainingSettings(backend="lm", lm_steps=steps, lm_learning_rate=1e-3)
    course = fine_tune(asked, TRAIN, validation, settings, progress, kept)
    return course, {name: tensor.detach().clone() for name, tensor in asked.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True)
def judged_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_training, "JUDGED_EVERY", 3)


def test_it_goes_on_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    course, whole = trained(base, 8)
    with pytest.raises(Stopped):
        trained(base, 8, kept=tmp_path, stop_at=5)
    again, resumed = trained(base, 8, kept=tmp_path)
    assert again == course and len(course.losses) == 8 and list(course.validation) == [3, 6, 8]
    assert same(whole, resumed)


def test_another_training_or_a_damaged_file_begins_anew(base: Path, tmp_path: Path) -> None:
    trained(base, 6, kept=tmp_path)
    other, _ = trained(base, 3, kept=tmp_path)
    assert len(other.losses) == 3 and list(other.validation) == [3]
    (tmp_path / FILE).write_bytes(b"no tensors")
    course, weights = trained(base, 3, kept=tmp_path)
    assert course == other and same(weights, trained(base, 3)[1])


def test_the_best_weights_are_taken(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.2, 0.4])
    monkeypatch.setattr(lm_training, "_validation_loss", lambda *_: next(values))
    course, weights = trained(base, 9)
    assert course.validation == {3: 0.5, 6: 0.2, 9: 0.4} and course.best_step == 6 and not course.converged
    last: dict[int, dict[str, Any]] = {}
    step = lm_training._step

    def seen(asked: Any, *arguments: Any) -> float:
        loss = step(asked, *arguments)
        last[len(last) + 1] = {name: tensor.detach().clone() for name, tensor in asked.model.state_dict().items()}
        return loss

    values = iter([0.5, 0.2, 0.4])
    monkeypatch.setattr(lm_training, "_step", seen)
    trained(base, 9)
    assert same(last[6], weights) and not same(last[9], weights)


def test_it_ends_when_validation_stops_falling(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.4, 0.3995, 0.41, 0.3999, 0.1])
    monkeypatch.setattr(lm_training, "_validation_loss", lambda *_: next(values))
    course, _ = trained(base, 30)
    assert len(course.losses) == 15 and course.converged and course.best_step == 9


def test_it_ends_when_validation_cannot_fall_any_more(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.5, 0.0005])
    monkeypatch.setattr(lm_training, "_validation_loss", lambda *_: next(values))
    course, _ = trained(base, 30)
    assert len(course.losses) == 6 and course.converged and course.best_step == 6


def test_without_validation_every_step_is_taken(base: Path) -> None:
    course, _ = trained(base, 4, validation=[])
    assert course.best_step == 4 and not course.validation and not course.converged


def test_validation_is_judged_by_the_letters(base: Path) -> None:
    """By hand: cross-entropy over two letters, options in their own order."""
    asked = LetterModel(base, LABELS, max_tokens=16)
    with torch.no_grad():
        hidden = asked.last_hidden([asked.question(text, LABELS) for text, _ in VALIDATION[:4]]).float()
    logits = asked.letters_head()(hidden).log_softmax(1)
    expected = -logits[torch.arange(4), torch.tensor([LABELS.index(label) for _, label in VALIDATION[:4]])].mean()
    assert lm_training._validation_loss(asked, VALIDATION[:4]) == pytest.approx(float(expected), abs=0.03)
