"""Words and pairs of words, counted: needs numpy alone, and is what every other backend has to beat."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meswitch_cli.router.backends.contract import Backend, FitRequest, FittedBackend, SavedBackend, all_features
from meswitch_cli.router.decide.conversation import clip_characters, clip_tokens

#: Terms are hashed into this many dimensions: no vocabulary is kept, so a router has one size.
DIMENSIONS = 4096
_WORD = re.compile(r"\w+|[^\w\s]")


class Tfidf(Backend):
    """log(1 + count) times inverse document frequency of hashed words and pairs of words, of unit length."""

    title = "TF-IDF"
    size = DIMENSIONS

    def __init__(self, idf: NDArray[np.float32], *, max_tokens: int) -> None:
        self._idf = idf
        self.max_tokens = max_tokens

    @classmethod
    def fit(cls, request: FitRequest) -> FittedBackend:
        made = cls.of(request.parts["train"].texts, max_tokens=request.settings.max_tokens)
        return FittedBackend(backend=made, features=all_features(made, request), standardise=False)

    @classmethod
    def load(cls, saved: SavedBackend) -> Tfidf:
        return cls(saved.tensors["tfidf.idf"].numpy(), max_tokens=saved.number("max_tokens"))

    @staticmethod
    def tensor_shapes(saved: SavedBackend) -> dict[str, tuple[int, ...]]:
        return {"tfidf.idf": (saved.number("size"),)}

    @classmethod
    def of(cls, texts: Sequence[str], *, max_tokens: int) -> Tfidf:
        """Learn the document frequencies: idf = log((n + 1) / (documents with the term + 1)) + 1."""
        present = np.zeros(DIMENSIONS, dtype=np.int64)
        for text in texts:
            present[np.unique(_terms(text, max_tokens))] += 1
        idf = np.log((len(texts) + 1) / (present + 1)) + 1
        return cls(idf.astype(np.float32), max_tokens=max_tokens)

    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = lambda count: None) -> torch.Tensor:
        counts = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
        for row, text in enumerate(texts):
            np.add.at(counts[row], _terms(text, self.max_tokens), 1)
        values = np.log1p(counts) * self._idf
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9)
        on_done(len(texts))
        return torch.from_numpy(values)

    def count_tokens(self, text: str) -> int:
        return sum(1 for _ in _words(clip_characters(text, self.max_tokens)))

    def settings(self) -> dict[str, Any]:
        return {"size": DIMENSIONS, "max_tokens": self.max_tokens}

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"tfidf.idf": torch.from_numpy(self._idf)}


BACKEND = Tfidf


def _words(text: str) -> Iterator[str]:
    return (match.group() for match in _WORD.finditer(text.casefold()))


def _terms(text: str, max_tokens: int) -> NDArray[np.int64]:
    """Hashes of the words and of the pairs of neighbours, in `[0, DIMENSIONS)`."""
    hashes = [zlib.crc32(word.encode("utf-8", "replace")) for word in _words(clip_characters(text, max_tokens))]
    hashes = clip_tokens(hashes, max_tokens)
    pairs = [zlib.crc32(b"%d %d" % pair) for pair in itertools.pairwise(hashes)]
    return np.array([*hashes, *pairs], dtype=np.int64) % DIMENSIONS
