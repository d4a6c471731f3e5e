"""Passes of models over a set: the full expert writes reference log-probabilities to disk, the others are compared.

One model is in memory at a time, or with `stream` one decoder layer, so a pair that does not fit together can still be
compared. The reference takes answer tokens x vocabulary x 4 bytes; a set that would take more than the budget goes
through in chunks, each with its own pass of every model.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from meswitch_cli.errors import EvaluationError, MeswitchError
from meswitch_cli.evaluation.fidelity import EncodedItem, answer_logits, compare_tokens, refuse_non_finite
from meswitch_cli.evaluation.figures import TokenFigures
from meswitch_cli.evaluation.streaming import streamed_logits
from meswitch_cli.model.build import build_model
from meswitch_cli.model.device import available_bytes
from meswitch_cli.model.weights import Weights, parameter_count

Mode = Literal["resident", "stream"]
REFERENCE_BUDGET = 4 << 30
#: Share of the free memory that a resident model's weights may take; activations and logits need the rest.
RESIDENT_SHARE = 0.7


@dataclass(frozen=True)
class Arithmetic:
    """Where and how models run."""

    device: torch.device
    dtype: torch.dtype
    mode: Mode


@dataclass(frozen=True)
class Failure:
    """Why a model has no figures on a set."""

    reason: str


def choose_mode(weights: Sequence[Weights], device: torch.device, dtype: torch.dtype) -> Mode:
    """`resident` where the largest model fits into the memory that is free."""
    largest = max(parameter_count(item) for item in weights) * dtype.itemsize
    return "resident" if largest <= RESIDENT_SHARE * available_bytes(device) else "stream"


def logits_of(
    weights: Weights, items: Sequence[EncodedItem], arithmetic: Arithmetic
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (item index, logits `[answer tokens, vocabulary]` fp32).

    Raises:
        EvaluationError: the model's logits are not finite; model, item and token are named.
    """
    model: Any = None
    if arithmetic.mode == "stream":
        found = streamed_logits(weights, items, arithmetic.device, arithmetic.dtype)
    else:
        model = build_model(weights, arithmetic.device, arithmetic.dtype)
        found = answer_logits(model, items)
    try:
        for index, logits in found:
            try:
                refuse_non_finite(logits, index)
            except FloatingPointError as error:
                raise EvaluationError(f"{weights.name}: {error}: its weights are damaged or overflow") from error
            yield index, logits
    finally:
        del model, found
        gc.collect()


class Reference:
    """A full expert's log-probabilities on disk, `[answer tokens, vocabulary]` fp32, for other models to be compared
    with."""

    def __init__(self, weights: Weights, items: Sequence[EncodedItem], arithmetic: Arithmetic, folder: Path) -> None:
        """Run the expert over the items and write into a folder.

        Raises:
            EvaluationError: the expert's logits are not finite, or the disk has no room.
        """
        self.items, self.arithmetic = list(items), arithmetic
        self._starts = [0, *np.cumsum([len(item.tokens) - item.answer_start for item in items]).tolist()]
        self._stored: np.memmap[Any, Any] | None = None
        for index, logits in logits_of(weights, items, arithmetic):
            if self._stored is None:
                self._stored = _room_for(folder / "log-probabilities", (self._starts[-1], logits.shape[-1]))
            self._stored[self._starts[index] : self._starts[index + 1]] = (
                torch.log_softmax(logits, dim=-1).cpu().numpy()
            )

    def compare(self, weights: Weights) -> list[TokenFigures]:
        """A model's figures, item by item.

        Raises:
            EvaluationError: the model's logits are not finite, or the items use tokens that it does not have.
        """
        assert self._stored is not None
        rows = weights.architecture.vocabulary
        unknown = sorted({token for item in self.items for token in item.tokens if token >= rows})
        if unknown:
            raise EvaluationError(
                f"{weights.name}: has {rows} embedding rows, the prompts use token {unknown[0]}, which the expert added"
            )
        results: dict[int, TokenFigures] = {}
        for index, logits in logits_of(weights, self.items, self.arithmetic):
            reference = torch.from_numpy(np.array(self._stored[self._starts[index] : self._starts[index + 1]]))
            results[index] = compare_tokens(reference, logits, self.items[index].answer)
        return [results[index] for index in range(len(self.items))]


def compare_models(
    reference: Weights,
    others: Mapping[str, Weights],
    items: Sequence[EncodedItem],
    arithmetic: Arithmetic,
    scratch: Path,
    *,
    budget: int = REFERENCE_BUDGET,
    on_pass: Callable[[str, int], None] = lambda name, items: None,
) -> dict[str, list[TokenFigures] | Failure]:
    """Compare every other model with the reference on the same tokens; a model that fails does not stop the rest.

    Args:
        reference: the full expert.
        others: the models, by label.
        items: what is compared; only answer tokens count.
        scratch: folder for the reference's log-probabilities; they are removed afterwards.
        budget: bytes they may take at once.
        on_pass: hears (label, items) before each pass; the reference's label is "reference".

    Raises:
        EvaluationError: the reference itself cannot be run.
    """
    results: dict[str, list[TokenFigures] | Failure] = {label: [] for label in others}
    for chunk in _chunks(items, max(1, budget // (4 * reference.architecture.vocabulary))):
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".reference-") as folder:
            on_pass("reference", len(chunk))
            stored = Reference(reference, chunk, arithmetic, Path(folder))
            for label, weights in others.items():
                sofar = results[label]
                if isinstance(sofar, Failure):
                    continue
                on_pass(label, len(chunk))
                try:
                    sofar += stored.compare(weights)
                except (MeswitchError, ValueError) as error:
                    results[label] = Failure(str(error))
            del stored
    return results


def _room_for(path: Path, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    try:
        with path.open("wb") as stream:
            # A sparse file on a disk that fills up would end the process with a bus error where it is written.
            stream.truncate(4 * shape[0] * shape[1])
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, 4 * shape[0] * shape[1])
        return np.memmap(path, dtype=np.float32, mode="r+", shape=shape)
    except OSError as error:
        raise EvaluationError(f"{path.parent}: no room for the reference's logits: {error.strerror}") from error


def _chunks(items: Sequence[EncodedItem], most_tokens: int) -> Iterator[list[EncodedItem]]:
    chunk: list[EncodedItem] = []
    tokens = 0
    for item in items:
        count = len(item.tokens) - item.answer_start
        if chunk and tokens + count > most_tokens:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(item)
        tokens += count
    if chunk:
        yield chunk
