"""Loading a base's weights into vLLM so that experts can be added to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader


class BaseLoader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's own loader of safetensors, for a vocabulary longer than the base's and weights that stay readable.

    `model_loader_extra_config` names the tensors of the vocabulary and says how many rows they get.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = dict(load_config.model_loader_extra_config)
        self._vocabulary, self._names = int(extra.pop("vocabulary")), frozenset(extra.pop("names"))
        super().__init__(dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config=extra))

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        for name, tensor in super().get_all_weights(model_config, model):
            if name in self._names and tensor.shape[0] < self._vocabulary:
                missing = self._vocabulary - tensor.shape[0]
                tensor = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
            yield name, tensor

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        for module in model.modules():
            if isinstance(module, LinearBase):
                # On a CPU vLLM would pack the weight for its own product and drop it; our kernels read it.
                module._cpu_skip_gemm_dispatch = True
        super().load_weights(model, model_config)
