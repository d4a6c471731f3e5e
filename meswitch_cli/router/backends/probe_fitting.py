"""Choosing the layer that the probe reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import RouterError
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.probe import Probe
from meswitch_cli.router.data import Example
from meswitch_cli.router.features import BaseHiddenStates, depth, encode
from meswitch_cli.router.head import Scaling, choose_head

if TYPE_CHECKING:
    from meswitch_cli.router.training import FittedBackend, Progress, TrainingSettings

#: Depths tried where none is given, as shares of the base's layers.
DEPTHS = (1 / 6, 1 / 4, 1 / 3, 1 / 2)


def fit_probe(
    parts: Mapping[str, Sequence[Example]],
    labels: tuple[str, ...],
    base: str,
    settings: TrainingSettings,
    on_progress: Progress,
) -> FittedBackend:
    """Read the base's hidden states at a few depths in one forward, and keep the depth that does best on validation.

    Of depths with equally few errors the shallowest is kept: its decisions are the fastest.
    """
    from meswitch_cli.router.training import FittedBackend, targets_of

    checkpoint = Checkpoint.open(base)
    layers = depth(checkpoint)
    tried = [settings.layer] if settings.layer else sorted({max(1, round(layers * share)) for share in DEPTHS})
    hidden_states = BaseHiddenStates(base, max(tried))
    tokenizer = load_tokenizer(checkpoint.source.path, RouterError)
    texts = {part: [example.text for example in members] for part, members in parts.items()}
    chosen_on = ("train", "validation") if len(tried) > 1 else ()
    total, done = sum(map(len, texts.values())), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress("hidden states", done, total)

    pooled = {
        part: hidden_states.pooled_at(
            [encode(tokenizer, text, settings.max_tokens) for text in texts[part]], tried, advance
        )
        for part in chosen_on
    }
    losses: dict[int, tuple[int, float]] = {}
    for layer in tried if chosen_on else []:
        scaling = Scaling.standard(pooled["train"][layer])
        train_targets, _ = targets_of(parts["train"], labels)
        validation_targets, validation_labels = targets_of(parts["validation"], labels)
        validation = scaling(pooled["validation"][layer])
        useful = train_targets.sum(1) > 0
        head, _, loss = choose_head(
            scaling(pooled["train"][layer])[useful], train_targets[useful], validation, validation_targets
        )
        losses[layer] = int((head(validation).argmax(1) != validation_labels).sum()), loss
    layer = min(tried, key=lambda item: (losses[item][0], item)) if losses else tried[0]
    size = int(hidden_states.hidden_size)
    probe = Probe(hidden_states, tokenizer, layer=layer, size=size, max_tokens=settings.max_tokens)
    features = {part: pooled[part][layer] if part in pooled else probe.features(texts[part], advance) for part in parts}
    return FittedBackend(
        probe,
        features,
        standardise=True,
        notes={
            "layers": layers,
            "validation_by_layer": {
                str(item): {"errors": errors, "nll": loss} for item, (errors, loss) in losses.items()
            },
        },
    )
