"""A head that is to be right on other people's prompts: fitted and judged with the general prompts of its fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from meswitch_cli.router.decide.head import PENALTIES, Head, cross_entropy, fit_head
from meswitch_cli.router.store.features import FeatureStore
from meswitch_cli.router.train.adoption import NOBODY, UNCLEAR, adopt

FOLDS = 3
#: Taken where there is no prompt to choose the penalty by.
USUAL_PENALTY = 1e-1


@dataclass(frozen=True)
class Known:
    """The prompts a router knows, and whose they are.

    Attributes:
        store: all of them.
        owners: `[n]` by row of the store: the expert whose field a general prompt is of, `NOBODY`, or `UNCLEAR`; of
            every other row its label.
    """

    store: FeatureStore
    owners: torch.Tensor

    @classmethod
    def of(cls, store: FeatureStore, classes: int) -> Known:
        """Find whose fields the general prompts are of."""
        owners = store.labels.clone()
        general, own = store.general_rows(), store.rows("train")
        if general.any():
            owners[general] = adopt(
                store.features[general],
                store.lengths[general],
                store.groups[general],
                store.features[own],
                store.lengths[own],
                store.labels[own],
                classes,
            )
        return cls(store, owners)

    @property
    def adopted(self) -> torch.Tensor:
        """Mask of the general prompts that are of an expert's field."""
        return self.store.general_rows() & (self.owners >= 0)

    @property
    def foreign(self) -> torch.Tensor:
        """Mask of the general prompts that are of no expert's."""
        return self.store.general_rows() & (self.owners == NOBODY)

    @property
    def points(self) -> torch.Tensor:
        """Mask of what a gate may remember: training prompts, those of no domain too, and general ones."""
        null = self.store.rows("train", null=True)
        return self.store.rows("train") | null | (self.store.general_rows() & (self.owners != UNCLEAR))


@dataclass(frozen=True)
class FittedHead:
    """A head, and how it did on prompts that it was not fitted on.

    Attributes:
        scores: `[n, labels]` of the adopted prompts, each by a head that had seen no prompt of its part of the field.
        truth: `[n]` their owners.
    """

    head: Head
    scores: torch.Tensor
    truth: torch.Tensor


def fit_generalising(known: Known, classes: int, penalties: Sequence[float] = PENALTIES) -> FittedHead:
    """Fit on training and adopted prompts, half of the weight each; the penalty is the best on those left out.

    Left out are the parts of a field in turn ("mathematics: algebra"), and always the data's own validation part: the
    mean of both cross-entropies decides.
    """
    store, adopted = known.store, known.adopted
    truth = known.owners[adopted]
    fold_of = _folds(store.fields[adopted], truth)
    validation = store.rows("validation")
    best: tuple[float, float, torch.Tensor] | None = None
    for penalty in penalties:
        scores = torch.zeros(len(truth), classes)
        for fold in range(FOLDS):
            held_out = fold_of == fold
            if held_out.any():
                head = _fit(known, adopted.clone().masked_scatter(adopted, ~held_out), classes, penalty)
                scores[held_out] = head(store.features[adopted][held_out])
        losses = []
        if len(truth):
            losses.append(float(cross_entropy(scores, torch.nn.functional.one_hot(truth, classes).float())))
        if validation.any():
            head = _fit(known, adopted, classes, penalty)
            losses.append(float(cross_entropy(head(store.features[validation]), store.targets[validation])))
        loss = sum(losses) / len(losses) if losses else float(penalty != USUAL_PENALTY)
        if best is None or loss < best[0] - 1e-6:
            best = loss, penalty, scores
    assert best is not None
    return FittedHead(_fit(known, adopted, classes, best[1]), best[2], truth)


def _folds(fields: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """The fold of every prompt: an expert's fields are dealt in turn, each whole."""
    folds = torch.zeros(len(fields), dtype=torch.long)
    for owner in torch.unique(owners):
        for turn, field in enumerate(torch.unique(fields[owners == owner])):
            folds[fields == field] = turn % FOLDS
    return folds


def _fit(known: Known, adopted: torch.Tensor, classes: int, penalty: float) -> Head:
    """Every label weighs the same, and of its weight the adopted prompts have half; uncertain examples weigh one."""
    store = known.store
    rows = store.training_rows()
    targets = torch.cat([store.targets[rows], torch.nn.functional.one_hot(known.owners[adopted], classes).float()])
    labels = torch.cat([store.labels[rows], known.owners[adopted]])
    is_adopted = torch.arange(len(labels)) >= int(rows.sum())
    weights = torch.ones(len(labels))
    share = int((labels >= 0).sum()) / classes
    for label in range(classes):
        sources = [mask for mask in ((labels == label) & ~is_adopted, (labels == label) & is_adopted) if mask.any()]
        for mask in sources:
            weights[mask] = share / len(sources) / int(mask.sum())
    features = torch.cat([store.features[rows], store.features[adopted]])
    return fit_head(features, targets * weights[:, None], penalty)
