"""The contract of a backend: everything that one is asked for, when a router is trained, stored, opened and asked."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router.backends.base import FolderBase, ReadableBase
from meswitch_cli.router.decide.backend import FeatureSource
from meswitch_cli.router.decide.head import Head

#: Told of progress: what is being done, and how many of how many prompts.
Progress = Callable[[str, int, int], None]
#: Stands for a label where there is no certain one.
NULL = -1


class Backend(FeatureSource):
    """A module of this folder has one class of this kind, under the name `BACKEND`.

    Attributes:
        title: what reports call it.
        needs_base: whether it reads the base's own hidden states.
        extendable: whether an expert can be added or removed without training the backend anew.
    """

    title: ClassVar[str]
    needs_base: ClassVar[bool] = False
    extendable: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def fit(cls, request: FitRequest) -> FittedBackend:
        """Make one from training data.

        Raises:
            RouterError, UsageError: the data cannot train it, or something that it needs is not given.
        """

    @classmethod
    @abstractmethod
    def load(cls, saved: SavedBackend) -> Backend:
        """Make the one of a stored router.

        Raises:
            RouterError: a setting is missing or impossible, or its model cannot be loaded.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What router.json must say to make this backend again; `size` is among it."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What router.safetensors must hold for it; a name begins with the module's and a dot."""
        return {}

    @staticmethod
    def tensor_shapes(saved: SavedBackend) -> dict[str, tuple[int, ...]]:
        """The shapes that `tensors` must have."""
        return {}

    def save_model(self, folder: Path) -> None:
        """Write a model of its own, if it has one, as a Hugging Face folder."""


@dataclass(frozen=True)
class SavedBackend:
    """What a router's folder holds of its backend, and the base that is at hand.

    Attributes:
        folder: where `save_model` wrote.
        base: given where the backend `needs_base`.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    folder: Path
    base: ReadableBase | None = None

    def number(self, name: str, limit: int = 1 << 20) -> int:
        """A positive whole number among the settings.

        Raises:
            RouterError: it is missing or something else.
        """
        value = self.settings.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise RouterError(f"router.json: backend: {name} is not a whole number from 1 to {limit}: {value!r}")
        return value


@dataclass(frozen=True)
class LabelledTexts:
    """Prompts of one part of the data.

    Attributes:
        targets: `[n, labels]` probability of each label; zeros for prompts of no domain.
        labels: `[n]` index of the certain label, `NULL` where there is none.
    """

    texts: tuple[str, ...]
    targets: torch.Tensor
    labels: torch.Tensor


class FitSettings(Protocol):
    """The settings of a training that concern backends: `layer` the probe, `lm_...` the language model."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def lm_steps(self) -> int: ...
    @property
    def lm_learning_rate(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """What a backend is fitted from.

    Attributes:
        parts: by name, `train` and `validation` among them; what belongs to the others may be looked at by nobody, and
            only their features are wanted.
        base, model: as the user gave them; there is a base where the backend `needs_base`.
        read_ahead: folder of what an interrupted training has read, None: nothing is kept.
        badness: of features by part, `[n, size]`: how ill they tell prompts apart. It is what a backend that can make
            several chooses by.
    """

    parts: Mapping[str, LabelledTexts]
    labels: tuple[str, ...]
    settings: FitSettings
    base: FolderBase | None = None
    model: Path | None = None
    read_ahead: Path | None = None
    badness: Callable[[Mapping[str, torch.Tensor]], float] = lambda features: 0.0
    on_progress: Progress = lambda what, done, total: None

    def counted(self, what: str) -> Callable[[int], None]:
        """What hears how many prompts are newly done, and tells `on_progress` how many are of all parts' together."""
        total, done = sum(len(part.texts) for part in self.parts.values()), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.on_progress(what, done, total)

        return advance


@dataclass(frozen=True, kw_only=True)
class FittedBackend:
    """A backend with what its fitting left.

    Attributes:
        features: by part, `[n, size]`.
        standardise: whether every dimension is to be scaled by its own deviation, or all by one number.
        head: where the fitting trained one.
        notes: remarks for the report.
    """

    backend: Backend
    features: dict[str, torch.Tensor]
    standardise: bool
    head: Head | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def all_features(
    backend: FeatureSource,
    request: FitRequest,
    on_done: Callable[[int], None] | None = None,
    known: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Every part's features, by part; those of a part in `known` are taken as they are."""
    found, heard = dict(known or {}), on_done or request.counted("features")
    for name, part in request.parts.items():
        if name not in found:
            found[name] = backend.features(part.texts, heard)
    return found
