"""What to look at after training: test prompts that the router refuses or doubts, and those that training gave away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.decide.neighbours import NOBODY, NeighbourGate
from meswitch_cli.router.store.known import KnownPrompt
from meswitch_cli.router.train.data import Example

#: Below this calibrated probability a routed prompt is doubtful.
DOUBTFUL = 0.8
#: From this cosine on a test prompt has a twin in training: the same template with other names or numbers.
TWIN = 0.95
_MOST_SHOWN = 10


def doubts(model: RouterModel, features: torch.Tensor, examples: Sequence[Example]) -> dict[str, Any]:
    """Those of the experts' test prompts that are refused, doubted or sent elsewhere, worst first, and how many.

    Args:
        features: `[n, d]` of the examples, as the backend gives them.
    """
    found = []
    for item, example in zip(model.judge(features), examples, strict=True):
        sure = item.verdict == "routed" and item.label == example.domain and item.confidence >= DOUBTFUL
        if example.domain is not None and not sure:
            excerpt = KnownPrompt.of(example.text, example.digest, example.domain).excerpt
            found.append(
                {
                    "prompt": excerpt,
                    "domain": example.domain,
                    "likeliest": item.label,
                    "verdict": item.verdict,
                    "confidence": item.confidence,
                    "distance": item.distance,
                }
            )
    found.sort(key=lambda entry: (entry["verdict"] == "routed", entry["confidence"]))
    return {"count": len(found), "prompts": found[:_MOST_SHOWN]}


def twins(model: RouterModel, features: torch.Tensor, examples: Sequence[Example]) -> float | None:
    """The share of the experts' test prompts that have a twin among the known ones; None where none are known."""
    inside = torch.tensor([example.domain is not None for example in examples])
    if not isinstance(model.gate, NeighbourGate) or not inside.any():
        return None
    similarities = model.gate.similarities(model.scaling(features[inside]))[:, model.gate.owners != NOBODY]
    return float((similarities.amax(1) >= TWIN).float().mean())
