"""The base as a backend reads it: hidden states after a decoder layer, averaged over tokens."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import RouterError, reason_of
from meswitch_cli.model.architecture import decoder_layers
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.model.weights import CheckpointWeights
from meswitch_cli.router.backends.read_ahead import ReadBatches
from meswitch_cli.router.backends.texts import mean_over_tokens, native_dtype, quiet_transformers
from meswitch_cli.token_batches import batches_by_length, padded


class PooledHiddenStates(Protocol):
    """Who gives hidden states: a serving engine from its resident base, or `BaseHiddenStates` from a folder."""

    def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
        """Mean over tokens of the hidden state after decoder layer `layer` (1 is the first), `[n, hidden]` fp32."""


class ReadableBase(Protocol):
    """A base that a router may read.

    Attributes:
        name: what messages call it.
        fingerprint: None where it is not known.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str | None: ...

    def hidden_states(self, layers: int) -> PooledHiddenStates:
        """Those of the first `layers` decoder layers, or of more."""

    def tokenizer(self) -> Any: ...


class ServedBase:
    """The base of a running engine, whose memory it is in anyway."""

    def __init__(
        self, hidden_states: PooledHiddenStates, tokenizer: Any, *, name: str = "base", fingerprint: str | None = None
    ) -> None:
        self._hidden_states, self._tokenizer = hidden_states, tokenizer
        self.name, self.fingerprint = name, fingerprint

    def hidden_states(self, layers: int) -> PooledHiddenStates:
        return self._hidden_states

    def tokenizer(self) -> Any:
        return self._tokenizer


class FolderBase:
    """A base on disk, of which nothing is read before it is asked for.

    Args:
        name: a checkpoint folder or a Hub id.
        fingerprint: where it is known already; it takes reading the whole base.
    """

    def __init__(self, name: str, fingerprint: str | None = None) -> None:
        self.name = name
        self._fingerprint = fingerprint

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.name)

    @property
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = CheckpointWeights(self.checkpoint).fingerprint
        return self._fingerprint

    @property
    def num_hidden_layers(self) -> int:
        return depth(self.checkpoint)

    def hidden_states(self, layers: int) -> BaseHiddenStates:
        return BaseHiddenStates(self.name, layers)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint.source.path, RouterError)


class BaseHiddenStates:
    """The first layers of a base: of its weights only the embedding and those layers are read.

    Args:
        base: a checkpoint folder or a Hub id.
        layers: how many decoder layers to load.
        dtype: None is bf16 where the processor multiplies it natively (`native_dtype`), else fp32.

    Raises:
        CheckpointError: there is no such checkpoint.
        RouterError: it has fewer layers, or transformers cannot load it.
    """

    def __init__(self, base: str, layers: int, dtype: torch.dtype | None = None) -> None:
        checkpoint = Checkpoint.open(base)
        self.num_hidden_layers = depth(checkpoint)
        if not 1 <= layers <= self.num_hidden_layers:
            raise RouterError(f"{base}: has {self.num_hidden_layers} decoder layers, layer {layers} is asked for")
        self._model, self._layers = _load(checkpoint.source.path, layers, dtype or native_dtype())
        self._lock = threading.Lock()
        self.hidden_size = int(self._model.config.get_text_config().hidden_size)

    def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
        return self.pooled_at(token_ids, (layer,))[layer]

    @torch.inference_mode()
    def pooled_at(
        self,
        token_ids: Sequence[Sequence[int]],
        layers: Sequence[int],
        on_done: Callable[[int], None] = lambda count: None,
        read: ReadBatches | None = None,
    ) -> dict[int, torch.Tensor]:
        """As `pooled_hidden_states` for several layers from one forward; `on_done` hears of every batch's prompts.

        Args:
            read: batches that need not be read again, to which those of this call are added.

        Raises:
            RouterError: a prompt has no token, or a layer was not loaded.
        """
        if any(not ids for ids in token_ids):
            raise RouterError("a prompt without tokens has no hidden states")
        if not 1 <= min(layers) <= max(layers) <= len(self._layers):
            raise RouterError(f"layers 1 to {len(self._layers)} are loaded, not {list(layers)}")
        pooled = {layer: torch.empty(len(token_ids), self.hidden_size) for layer in layers}
        captured: dict[int, torch.Tensor] = {}
        with self._lock:  # hooks hear every forward of the model, another thread's too
            hooks = [self._layers[layer - 1].register_forward_hook(_keep(captured, layer)) for layer in pooled]
            try:
                for batch in batches_by_length([len(ids) for ids in token_ids]):
                    members = [token_ids[index] for index in batch]
                    found = read.get(members, layers, self.hidden_size) if read else None
                    if found is None:
                        inputs, mask = padded(members)
                        # Padding is on the right and attention is causal: no token sees it, so none needs a mask.
                        self._model(input_ids=inputs, use_cache=False)
                        found = {layer: mean_over_tokens(hidden, mask) for layer, hidden in captured.items()}
                        if read:
                            read.put(members, found)
                    for layer, means in found.items():
                        pooled[layer][batch] = means
                    on_done(len(batch))
            finally:
                for hook in hooks:
                    hook.remove()
        return pooled


def _keep(captured: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        captured[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def depth(checkpoint: Checkpoint) -> int:
    """How many decoder layers a checkpoint has.

    Raises:
        RouterError: its config does not say.
    """
    config = checkpoint.config.get("text_config", checkpoint.config)
    layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if not isinstance(layers, int) or layers < 1:
        raise RouterError(f"{checkpoint.source.path}: config.json does not say num_hidden_layers")
    return layers


def _load(folder: Path, layers: int, dtype: torch.dtype) -> tuple[Any, nn.ModuleList]:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        with quiet_transformers():  # the weights of the layers left out are "unexpected"
            model = AutoModel.from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except Exception as error:  # transformers raises many kinds for a checkpoint it cannot load
        raise RouterError(f"{folder}: cannot be loaded for its hidden states: {reason_of(error)}") from error
    return model.eval(), decoder_layers(model, str(folder))[1]
