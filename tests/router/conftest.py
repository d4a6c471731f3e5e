"""Small routers on tiny models and generated prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.base import BaseHiddenStates, ServedBase
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.store import RouterArtifact, open_router, write_router
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import TrainedRouter, train_router
from zoo.tiny import make_pair

WORDS = {
    "maths": [
        "sum",
        "product",
        "fraction",
        "triangle",
        "integer",
        "divide",
        "equation",
        "percent",
        "remainder",
        "total",
    ],
    "code": ["function", "python", "loop", "variable", "compile", "string", "return", "array", "import", "class"],
    "law": ["court", "contract", "tenant", "liability", "statute", "plaintiff", "appeal", "damages", "clause", "jury"],
    None: ["zzz", "qqq", "xyzzy", "%%", "99", "##", "plugh", "@@", "vvv", "&&"],
}


def sentences(domain: str | None, count: int, seed: int = 0) -> list[str]:
    """Prompts of eight of the domain's words, all different."""
    draw = random.Random(f"{domain}/{seed}")
    return [f"{' '.join(draw.choices(WORDS[domain], k=8))} {index}" for index in range(count)]


def examples(counts: dict[str | None, int], seed: int = 0) -> list[Example]:
    return [
        Example(text, domain, f"test {domain} {index}")
        for domain, count in counts.items()
        for index, text in enumerate(sentences(domain, count, seed))
    ]


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


COUNTS: dict[str | None, int] = {"maths": 80, "code": 80, None: 40}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of four layers."""
    return make_pair(tmp_path_factory.mktemp("router"), num_hidden_layers=4)[0]


@pytest.fixture(scope="session")
def trained_probe(base: Path) -> TrainedRouter:
    return train_router(gather(examples(COUNTS)), TrainingSettings(max_tokens=64), base=str(base))


@pytest.fixture
def probe_folder(trained_probe: TrainedRouter, tmp_path: Path) -> Path:
    """A written probe router, new for every test: it may be spoilt."""
    return save(trained_probe, tmp_path / "router").path


@pytest.fixture(scope="session")
def tfidf_router() -> Router:
    return train_router(gather(examples(COUNTS)), TrainingSettings(backend="tfidf")).router


def save(trained: TrainedRouter, folder: Path) -> RouterArtifact:
    model, known = trained.router.model, trained.known
    return write_router(folder, trained.manifest, model, trained.backend, trained.store, known=known)


@pytest.fixture(scope="session")
def load_probe(base: Path) -> Callable[[Path], Router]:
    served = ServedBase(BaseHiddenStates(str(base), 4), load_tokenizer(base))
    return lambda folder: open_router(folder, served)
