"""Hidden states of prompts by layer, read once and kept."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.base import BaseHiddenStates
from meswitch_cli.router.backends.probe_fitting import layers_to_try
from meswitch_cli.router.backends.texts import encode
from meswitch_cli.router.train.data import Example

MAX_TOKENS = 256


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of every text by layer, `[n, hidden]`, mean over tokens."""

    rows: Mapping[str, int]
    by_layer: Mapping[int, torch.Tensor]

    def of(self, examples: Sequence[Example], layers: Sequence[int]) -> torch.Tensor:
        """Of length 1 in each layer, several layers side by side."""
        index = [self.rows[example.text] for example in examples]
        return torch.cat([normalize(self.by_layer[layer][index], dim=1) for layer in layers], dim=1)


def read(base: Path, texts: Sequence[str], scratch: Path) -> HiddenStates:
    """Read them with the base's first half, but for those that an earlier run left."""
    file = scratch / "hidden_states.pt"
    kept: dict[str, Any] = torch.load(file, weights_only=True) if file.exists() else {"texts": [], "by_layer": {}}
    known = set(kept["texts"])
    texts = [text for text in texts if text not in known]
    layers = layers_to_try(BaseHiddenStates(str(base), 1).num_hidden_layers)
    if texts:
        kept = _joined(kept, texts, _read(base, texts, layers))
        torch.save(kept, file)
    return HiddenStates({text: row for row, text in enumerate(kept["texts"])}, kept["by_layer"])


def _joined(kept: Mapping[str, Any], texts: Sequence[str], found: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    by_layer = {layer: torch.cat([kept["by_layer"].get(layer, found[layer][:0]), found[layer]]) for layer in found}
    return {"texts": [*kept["texts"], *texts], "by_layer": by_layer}


def _read(base: Path, texts: Sequence[str], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    tokenizer = load_tokenizer(base)
    token_ids = [encode(tokenizer, text, MAX_TOKENS) for text in texts]
    done = 0

    def heard(count: int) -> None:
        nonlocal done
        done += count
        print(f"hidden states: {done}/{len(texts)}", file=sys.stderr, flush=True)

    return BaseHiddenStates(str(base), max(layers)).pooled_at(token_ids, layers, heard)
