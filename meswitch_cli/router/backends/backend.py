"""The contract of a backend, and which one a saved router needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router.features import HiddenStates

Kind = Literal["probe", "encoder", "tfidf", "lm"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Backend(Protocol):
    """Prompts to features. One object serves training and serving alike, so the two cannot differ.

    Attributes:
        kind: what router.json calls it.
        size: dimensions of a feature vector.
        max_tokens: of a prompt; more are cut from its middle.
        extendable: whether an expert can be added without training the backend anew.
    """

    kind: Kind
    size: int
    max_tokens: int
    extendable: bool

    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = ...) -> torch.Tensor:
        """`[n, size]` fp32; `on_done` hears how many prompts are newly done."""

    def count_tokens(self, text: str) -> int:
        """Tokens of a prompt before anything is cut; of a very long one, a lower bound."""

    def settings(self) -> dict[str, Any]:
        """What router.json must say to make this backend again."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What router.safetensors must hold for it."""

    def save_model(self, folder: Path) -> None:
        """Write a model of its own, if it has one, as a Hugging Face folder."""


def load_backend(
    kind: Kind,
    settings: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    hidden_states: HiddenStates | None,
    tokenizer: Any,
) -> Backend:
    """Make the backend of a saved router; `folder` holds its model, where it has one.

    Raises:
        RouterError: a setting is missing or impossible, or the probe is not given the base's hidden states.
    """
    # Imported late: only one of them is needed, and three bring transformers along.
    if kind == "probe":
        from meswitch_cli.router.backends.probe import Probe

        if hidden_states is None or tokenizer is None:
            raise RouterError(
                "this router reads the base's hidden states: give the base it was trained on (--base), "
                "or serve it beside that base"
            )
        return Probe(
            hidden_states,
            tokenizer,
            layer=size_setting(settings, "layer"),
            size=size_setting(settings, "size"),
            max_tokens=size_setting(settings, "max_tokens"),
        )
    if kind == "tfidf":
        from meswitch_cli.router.backends.tfidf import Tfidf

        return Tfidf(tensors["tfidf.idf"].numpy(), max_tokens=size_setting(settings, "max_tokens"))
    if kind == "encoder":
        from meswitch_cli.router.backends.encoder import Encoder

        return Encoder(folder, max_tokens=size_setting(settings, "max_tokens"))
    from meswitch_cli.router.backends.lm import LetterModel

    options = settings.get("options")
    if not isinstance(options, list) or not all(isinstance(item, str) for item in options):
        raise RouterError("router.json: backend: options is not a list of names")
    return LetterModel(folder, tuple(options), max_tokens=size_setting(settings, "max_tokens"))


def size_setting(settings: Mapping[str, Any], name: str, limit: int = 1 << 20) -> int:
    """A positive whole number out of router.json.

    Raises:
        RouterError: it is missing or something else.
    """
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise RouterError(f"router.json: backend: {name} is not a whole number from 1 to {limit}: {value!r}")
    return value
