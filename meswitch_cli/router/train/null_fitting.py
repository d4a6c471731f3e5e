"""A class for prompts of no expert's field: fitted on general prompts, judged on fields that it has not seen."""

from __future__ import annotations

import torch

from meswitch_cli.router.decide.head import Head, fit_head
from meswitch_cli.router.decide.null_class import null_log_odds
from meswitch_cli.router.train.adoption import NOBODY
from meswitch_cli.router.train.generalising import Known

FOLDS = 5
#: Of 1 to 0.01 it made no difference on other people's prompts (docs/results/router_others.md).
PENALTY = 1e-1


def fit_null_class(known: Known, rows: torch.Tensor, classes: int, start: Head | None = None) -> Head:
    """The scores of each expert's field and, last, of any other, `[classes + 1, d]`, from the known prompts in `rows`.

    Other fields weigh as much as the experts' together, and of those every one the same.

    Args:
        rows: mask of rows of the store, each with an owner.
        start: where the search begins.
    """
    owners = known.owners[rows]
    weights = torch.zeros(len(owners))
    for owner in (NOBODY, *range(classes)):
        mask = owners == owner
        share = 0.5 if owner == NOBODY else 0.5 / classes
        weights[mask] = share * len(owners) / max(1, int(mask.sum()))
    targets = torch.nn.functional.one_hot(torch.where(owners == NOBODY, classes, owners), classes + 1).float()
    fitted = fit_head(known.store.features[rows], targets * weights[:, None], PENALTY, start)
    # In 16 bit, as it is stored: a router that was saved and loaded decides as it did before.
    return Head(fitted.weight.half().float(), fitted.bias)


def unseen_log_odds(known: Known, whole: Head, classes: int) -> torch.Tensor:
    """Log odds of other fields, `[n]` by row of the store, of a general prompt by a class fitted without its kind.

    Its kind is its field, or of an adopted prompt its part of the field; fields are left out a fifth at a time.

    Args:
        whole: the class fitted on all that is known, which judges every other row.
    """
    odds = null_log_odds(whole(known.store.features))
    fold_of = _folds(known, classes)
    for fold in range(FOLDS):
        left_out = fold_of == fold
        if left_out.any():
            head = fit_null_class(known, known.points & ~left_out, classes, whole)
            odds[left_out] = null_log_odds(head(known.store.features[left_out]))
    return odds


def _folds(known: Known, classes: int) -> torch.Tensor:
    """The fold of every general prompt, -1 of every other: kinds are dealt in turn, each expert's by themselves."""
    store = known.store
    dealt = [(known.foreign, store.groups)]
    dealt += [(known.adopted & (known.owners == owner), store.fields) for owner in range(classes)]
    folds = torch.full((len(known.owners),), -1)
    for mask, kinds in dealt:
        for turn, kind in enumerate(torch.unique(kinds[mask])):
            folds[mask & (kinds == kind)] = turn % FOLDS
    return folds
