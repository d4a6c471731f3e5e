"""The registry, and a backend that no file but its own knows."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router import TrainingSettings, gather, open_router, train_router
from meswitch_cli.router import backends as folder
from meswitch_cli.router.backends import KINDS, backend_class
from meswitch_cli.router.backends.contract import Backend, FitRequest, FittedBackend, SavedBackend, all_features
from meswitch_cli.router.store import write_router
from meswitch_cli.router.train import add_expert, remove_expert
from meswitch_cli.router.train.report import markdown

from .conftest import COUNTS, examples, save, sentences


def test_every_backend_is_listed_under_its_file_s_name() -> None:
    modules = {path.stem for path in Path(folder.__file__).parent.glob("*.py") if "\nBACKEND = " in path.read_text()}
    assert modules == set(KINDS)
    made = [backend_class(kind) for kind in KINDS]
    assert all(issubclass(item, Backend) for item in made)
    assert len({item.title for item in made}) == len(KINDS)


class Letters(Backend):
    """How often each letter occurs, minus the average of the training prompts."""

    title = "letters"
    size = 26

    def __init__(self, average: torch.Tensor, max_tokens: int) -> None:
        self.average, self.max_tokens = average, max_tokens

    @classmethod
    def fit(cls, request: FitRequest) -> FittedBackend:
        made = cls(torch.zeros(26), request.settings.max_tokens)
        made.average = made.features(request.parts["train"].texts).mean(0)
        return FittedBackend(backend=made, features=all_features(made, request), standardise=True)

    @classmethod
    def load(cls, saved: SavedBackend) -> Letters:
        return cls(saved.tensors["letters.average"], saved.number("max_tokens"))

    @staticmethod
    def tensor_shapes(saved: SavedBackend) -> dict[str, tuple[int, ...]]:
        return {"letters.average": (saved.number("size"),)}

    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = lambda count: None) -> torch.Tensor:
        rows = [[text.lower().count(chr(97 + index)) / len(text) for index in range(26)] for text in texts]
        on_done(len(texts))
        return torch.tensor(rows) - self.average

    def count_tokens(self, text: str) -> int:
        return len(text)

    def settings(self) -> dict[str, Any]:
        return {"size": 26, "max_tokens": self.max_tokens}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"letters.average": self.average}


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> str:
    """What a file in the folder and a word in the registry would do."""
    module = types.ModuleType("meswitch_cli.router.backends.letters")
    module.BACKEND = Letters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("meswitch_cli.router.store.manifest.KINDS", (*KINDS, "letters"))
    return "letters"


def test_a_new_backend_is_trained_stored_opened_extended_and_reported(letters: str, tmp_path: Path) -> None:
    settings = TrainingSettings(backend=letters, target_precision=0.6)  # type: ignore[arg-type]
    trained = train_router(gather(examples(COUNTS)), settings)
    assert "| letters |" in markdown(trained.report)
    artifact = save(trained, tmp_path / "router")
    opened = open_router(artifact.path)
    assert isinstance(opened.backend, Letters) and torch.equal(opened.backend.average, trained.backend.average)
    texts = sentences("maths", 20, seed=1) + sentences("code", 20, seed=1)
    assert [opened.route(text).expert for text in texts] == [trained.router.route(text).expert for text in texts]
    assert sum(opened.route(text).expert == "maths" for text in texts[:20]) >= 12
    edit = add_expert(artifact, opened.backend, "law", examples({"law": 80}))
    bigger = write_router(tmp_path / "bigger", edit.manifest, edit.model, None, edit.store, source=artifact)
    assert bigger.manifest.labels == ("code", "law", "maths")
    assert remove_expert(bigger, "law").manifest.labels == ("code", "maths")


def test_a_tensor_of_another_shape_is_refused(letters: str, tmp_path: Path) -> None:
    settings = TrainingSettings(backend=letters, target_precision=0.6)  # type: ignore[arg-type]
    trained = train_router(gather(examples(COUNTS)), settings)
    backend = Letters(torch.zeros(25), 256)
    with pytest.raises(RouterError, match=r"'letters\.average' is \[25\], must be \[26\]"):
        write_router(tmp_path / "router", trained.manifest, trained.router.model, backend, trained.store)


def test_a_kind_that_is_not_listed_is_no_router_s(tmp_path: Path) -> None:
    artifact = save(train_router(gather(examples(COUNTS)), TrainingSettings(backend="tfidf")), tmp_path / "router")
    file = artifact.path / "router.json"
    file.write_text(file.read_text().replace('"backend": "tfidf"', '"backend": "letters"', 1))
    with pytest.raises(RouterError, match="'backend' is not one of probe, encoder, tfidf, lm"):
        open_router(artifact.path)
