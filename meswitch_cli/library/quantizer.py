"""Artifacts as transformers' own `from_pretrained` loads them: base + delta, in place of weights that it finds none of.

transformers lets a quantization method be registered from outside. Ours tells it which file to open, lets it build the
model without weights, and then fills every parameter from the base and the artifact. The result is a plain model.

This module is imported in the midst of transformers' own import, so what it needs of ours it imports when it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from meswitch_cli.artifact.quantization import BASE_ENTRY, QUANT_METHOD
from meswitch_cli.errors import ArtifactError


class MeswitchConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What an artifact's config.json says of it.

    Attributes:
        weights: one of its shards, which transformers opens to see that there are weights.
    """

    def __init__(self, weights: str = "", **others: Any) -> None:
        self.quant_method, self.weights = QUANT_METHOD, weights
        self.dequantize = True  # the model is plain: transformers removes the method from its config


class MeswitchQuantizer(HfQuantizer):  # type: ignore[misc]
    """Fills a model that transformers has built with base + delta."""

    requires_calibration = True  # there is nothing that `from_pretrained` could make of plain weights

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the config before the weights' files are looked for."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **others: Any
    ) -> Any:
        from meswitch_cli.artifact.artifact import Artifact
        from meswitch_cli.hub.fetch import whole_artifact

        if not checkpoint_files:
            raise ArtifactError(f"{model.config.name_or_path}: no file of an artifact")
        self._artifact = Artifact.open(whole_artifact(Path(checkpoint_files[0]).parent))
        model._keys_to_ignore_on_load_missing = model._keys_to_ignore_on_load_unexpected = {""}  # all of them
        model.initialize_weights = lambda: _initialise_buffers(model)
        return model

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **others: Any) -> Any:
        from meswitch_cli.library.artifacts import expert_weights

        for name in ("initialize_weights", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
            delattr(model, name)
        base = getattr(model.config, BASE_ENTRY, None)
        if not isinstance(base, str):
            raise ArtifactError(f"{self._artifact.path}: config.json names no base; give {BASE_ENTRY}=BASE")
        weights = expert_weights(base, self._artifact)
        places = dict(model.named_parameters()) | dict(model.named_buffers())
        described = weights.architecture
        tied = {name for name, parameter in described.parameters.items() if parameter.tied_to is not None}
        held = [name for name in described.held if name not in tied]
        for name in held:
            if name not in places or places[name].is_meta:
                raise ArtifactError(
                    f"{self._artifact.path}: {name!r} has no place in this model: load it with AutoModelForCausalLM, "
                    "without offloading or tensor parallelism"
                )
        for name, value in weights.buffers.items():
            places[name].copy_(value)
        for name, value in described.values(held, weights.read):
            places[name].copy_(value)
        for name in (BASE_ENTRY, "transformers_weights"):
            if hasattr(model.config, name):
                delattr(model.config, name)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _initialise_buffers(model: Any) -> None:
    """What transformers does for weights that it has not found, but for the parameters: those are filled anyway."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    type(model).initialize_weights(model)


def register() -> None:
    """Make transformers know artifacts; once is enough."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(MeswitchConfig)
        register_quantizer(QUANT_METHOD)(MeswitchQuantizer)
