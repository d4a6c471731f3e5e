"""Hidden states of the base, on the weights that are on the device anyway."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from meswitch_cli.engine.base_model import BaseModel
from meswitch_cli.engine.contract import EngineError, InvalidRequestError
from meswitch_cli.engine.own_parameters import BASE_SLOT


class HiddenStateReader:
    """Runs the first layers of a base; any thread may, beside the one that generates."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._cut: dict[int, Any] = {}
        self._lock = threading.Lock()

    @torch.inference_mode()
    def pooled(self, token_ids: Sequence[Sequence[int]], layer: int) -> Tensor:
        """Mean over tokens after decoder layer `layer` (1 is the first), `[prompts, hidden]` fp32 on the CPU.

        Raises:
            EngineError: no such layer, or an empty prompt.
        """
        check_prompts(token_ids, layer, self._base.architecture.num_layers, self._base.vocabulary)
        model = self._model(layer)
        device = self._base.device
        rows = []
        own = self._base.own_parameters
        for tokens in token_ids:
            ids = torch.tensor([list(tokens)], device=device)
            with nullcontext() if own is None else own.placed(BASE_SLOT):
                rows.append(model(input_ids=ids, use_cache=False).last_hidden_state[0].float().mean(0))
        return torch.stack(rows).cpu() if rows else torch.empty(0, self._base.embedding.weight.shape[1])

    def _model(self, layer: int) -> Any:
        """The decoder with its first `layer` layers and no last norm; the weights are the base's."""
        with self._lock:
            if layer not in self._cut:
                self._cut[layer] = _cut(self._base, layer)
            return self._cut[layer]


def check_prompts(token_ids: Sequence[Sequence[int]], layer: int, layers: int, vocabulary: int) -> None:
    """Refuse what has no hidden state.

    Raises:
        EngineError: no such layer, an empty prompt, or a token beyond the vocabulary.
    """
    if not 1 <= layer <= layers:
        raise EngineError(f"layer {layer}: the base has layers 1 to {layers}")
    if not all(token_ids):
        raise EngineError("a prompt without tokens has no hidden state")
    if any(max(tokens) >= vocabulary for tokens in token_ids):
        raise InvalidRequestError(f"input: there is a token outside 0 to {vocabulary - 1}", "input")


def _cut(base: BaseModel, layer: int) -> Any:
    whole = base.model.base_model
    prefix = f"{base.model.base_model_prefix}."
    path = base.architecture.layers_prefix.removeprefix(prefix)
    if "." in path:
        raise EngineError(f"{base.architecture.model_type}: its decoder layers are not directly in its decoder")
    cut = copy.copy(whole)
    cut._modules = dict(whole._modules)
    cut._modules[path] = nn.ModuleList(list(getattr(whole, path))[:layer])
    # The last norm is the one norm that hangs in the decoder itself.
    last = [name.removeprefix(prefix) for name in base.norms if "." not in name.removeprefix(prefix)]
    if base.own_parameters is not None:
        last = [name for name, module in whole.named_children() if _is_norm(module)]
    for name in last:
        cut._modules[name] = nn.Identity()
    return cut


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has a gain, and perhaps a shift, and nothing else."""
    own = dict(module.named_parameters())
    return {"weight"} <= set(own) <= {"weight", "bias"} and all(value.dim() == 1 for value in own.values())
