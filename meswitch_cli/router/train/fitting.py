"""From stored features to a router's model: what training, adding and removing have in common."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router.decide.gates import (
    LOWEST_CONFIDENCE,
    confidence_threshold,
    distance_threshold,
    fit_distances,
)
from meswitch_cli.router.decide.head import Head, Scaling
from meswitch_cli.router.decide.model import Gate, RouterModel
from meswitch_cli.router.decide.temperature import fit_temperature
from meswitch_cli.router.store.features import FeatureStore
from meswitch_cli.router.train.gating import draw_gate
from meswitch_cli.router.train.generalising import USUAL_PENALTY, FittedHead, Known, fit_generalising
from meswitch_cli.router.train.measures import auroc


def fit_model(
    labels: tuple[str, ...],
    scaling: Scaling,
    store: FeatureStore,
    *,
    target_precision: float,
    seed: int,
    head: Head | None = None,
) -> RouterModel:
    """Fit head, temperature and gates, each on the part of the data that is meant for it.

    Args:
        store: its features are already scaled by `scaling`.
        head: taken as it is where the backend trained one.

    Raises:
        RouterError: no threshold reaches the target precision.
    """
    known = Known.of(store, len(labels))
    fitted = fit_generalising(known, len(labels)) if head is None else _judged(head, known)
    calibration = store.rows("calibration")
    own = fitted.head(store.features[calibration])
    gate, held_in, null = _gate(known, len(labels), seed)
    scores = torch.cat([own, fitted.scores])
    truth = torch.cat([store.labels[calibration], fitted.truth])
    temperature = fit_temperature(scores, truth) if len(truth) else 1.0
    # Prompts of no domain that pass the distance gate are routed wrongly, whatever their label.
    near = held_in <= gate.threshold
    confidence, correct = torch.softmax(scores / temperature, dim=1).amax(1), scores.argmax(1) == truth
    null_scores = fitted.head(store.features[store.rows("calibration", null=True)])[null <= gate.threshold]
    null_confidence = torch.softmax(null_scores / temperature, dim=1).amax(1)
    is_own = torch.arange(len(truth)) < len(own)
    threshold = LOWEST_CONFIDENCE
    if len(own):
        every = torch.cat([confidence[near & is_own], null_confidence])
        right = [*correct[near & is_own].tolist(), *([False] * len(null_scores))]
        threshold = confidence_threshold(every.tolist(), right, target_precision)
    adopted = near & ~is_own
    if adopted.any():
        # These raise the threshold where that helps. Where none helps it is the field that is unclear, not the data.
        with contextlib.suppress(RouterError):
            line = confidence_threshold(confidence[adopted].tolist(), correct[adopted].tolist(), target_precision)
            threshold = max(threshold, line)
    return RouterModel(labels, scaling, fitted.head, gate, temperature, threshold)


def _judged(head: Head, known: Known) -> FittedHead:
    """A head that saw none of the general prompts, with its scores of those that are of its experts' fields."""
    return FittedHead(head, head(known.store.features[known.adopted]), known.owners[known.adopted])


def _gate(known: Known, classes: int, seed: int) -> tuple[Gate, torch.Tensor, torch.Tensor]:
    """The gate with the distances of held-in prompts, the calibration part before the adopted, and of null ones."""
    store = known.store
    calibration = store.features[store.rows("calibration")]
    if known.foreign.any() or store.rows("train", null=True).any():
        drawn = draw_gate(known, classes, seed)
        return drawn.gate, torch.cat([drawn.gate.distances(calibration), drawn.adopted]), drawn.null
    # A router of format version 1 that is edited: it knows no prompt of another field to compare with.
    certain = store.rows("train")
    gate = fit_distances(store.features[certain], store.labels[certain], classes, seed)
    held_in = gate.distances(calibration)
    null = gate.distances(store.features[store.rows("calibration", null=True)])
    return replace(gate, threshold=distance_threshold(held_in, null)), held_in, null


def badness(store: FeatureStore, labels: tuple[str, ...]) -> float:
    """How ill features tell prompts apart: the share of wrong answers, and the chance that the gate errs.

    The first is the mean of the validation part and of the adopted prompts, each judged by a head that had seen no
    prompt of its part of the field. The second is 1 - AUROC of the gate on general prompts that it was made to forget.
    """
    known = Known.of(store, len(labels))
    fitted = fit_generalising(known, len(labels), (USUAL_PENALTY,))
    validation = store.rows("validation")
    judged = [(fitted.scores, fitted.truth), (fitted.head(store.features[validation]), store.labels[validation])]
    wrong = [float((scores.argmax(1) != truth).float().mean()) for scores, truth in judged if len(truth)]
    drawn = draw_gate(known, len(labels), seed=0)
    held_in = drawn.adopted if len(drawn.adopted) else drawn.gate.distances(store.features[validation])
    missed = 1 - auroc(held_in.double().numpy(), drawn.foreign.double().numpy()) if len(held_in) else 0.0
    return sum(wrong) / max(1, len(wrong)) + missed
