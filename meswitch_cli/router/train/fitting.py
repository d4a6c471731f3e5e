"""From stored features to a router's model: what training, adding and removing have in common."""

from __future__ import annotations

from dataclasses import replace

import torch

from meswitch_cli.router.decide.gates import confidence_threshold, distance_threshold, fit_distances
from meswitch_cli.router.decide.head import Head, Scaling, choose_head
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.decide.temperature import fit_temperature
from meswitch_cli.router.store.features import FeatureStore


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
    train, validation, calibration = store.training_rows(), store.rows("validation"), store.rows("calibration")
    if head is None:
        head, _, _ = choose_head(
            store.features[train], store.targets[train], store.features[validation], store.targets[validation]
        )
    certain = store.rows("train")
    gate = fit_distances(store.features[certain], store.labels[certain], len(labels), seed)
    held_in = gate.distances(store.features[calibration])
    null = gate.distances(store.features[store.rows("calibration", null=True)])
    gate = replace(gate, threshold=distance_threshold(held_in, null))
    scores = head(store.features[calibration])
    temperature = fit_temperature(scores, store.labels[calibration])
    # Prompts of no domain that pass the distance gate are routed wrongly, whatever their label.
    null_scores = head(store.features[store.rows("calibration", null=True)])[null <= gate.threshold]
    near = held_in <= gate.threshold
    every = torch.cat([scores[near], null_scores])
    confidence = torch.softmax(every / temperature, dim=1).amax(1)
    correct = [
        *(scores[near].argmax(1) == store.labels[calibration][near]).tolist(),
        *([False] * len(null_scores)),
    ]
    threshold = confidence_threshold(confidence.tolist(), correct, target_precision)
    return RouterModel(labels, scaling, head, gate, temperature, threshold)
