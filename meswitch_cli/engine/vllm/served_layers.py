"""Finding transformers' layers in vLLM's model, and exchanging their arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.base_model import without_gain
from meswitch_cli.engine.batch import CurrentBatch
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.modules import kernels
from meswitch_cli.engine.vllm.layers import (
    ExpertLinearMethod,
    ExpertResidualNorm,
    ExpertVocabularyMethod,
    Rows,
    VocabularyLimits,
)
from meswitch_cli.engine.vllm.names import BaseNames, base_names
from meswitch_cli.model.architecture import Storage, architecture

#: Where vLLM keeps what runs the families that it has no code for. Its layers see tokens in another dimension.
TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers"
#: Rows of each weight that are compared with the checkpoint's.
COMPARED_ROWS = 8


@dataclass
class ServedLayers:
    """The layers of a base in vLLM, by transformers' names; `banks.Layers`."""

    linears: dict[str, Rows]
    norms: dict[str, ExpertResidualNorm]
    embedding: Rows
    head: Rows
    embedding_name: str
    head_name: str
    tied: bool
    limits: VocabularyLimits
    device: torch.device
    dtype: torch.dtype

    def layer(self, name: str) -> Rows:
        if name == self.embedding_name:
            return self.embedding
        return self.head if name == self.head_name else self.linears[name]


def serve_layers(model: Any, base: Checkpoint, current: CurrentBatch, slots: int) -> ServedLayers:
    """Exchange the arithmetic of every layer of `model`, a model of vLLM on its device with the base's weights.

    Raises:
        EngineError: a layer is not found, or vLLM keeps its weights otherwise than the checkpoint.
    """
    described = architecture(base.config, str(base.source.path))
    if type(model).__module__.startswith(TRANSFORMERS_BACKEND):
        raise EngineError(
            f"vLLM has no code of its own for {described.model_type} and would run transformers'; "
            "use --engine transformers"
        )
    names = base_names(described)
    model.requires_grad_(False)
    embedding_module, head_module = _vocabulary_modules(model, base)
    device, dtype = embedding_module.weight.device, embedding_module.weight.dtype
    backend = kernels(device, dtype)
    linears: dict[str, Rows] = {}
    norms: dict[str, ExpertResidualNorm] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearBase):
            parts = _parts(model, name, module, names, described.parameters)
            module.quant_method = ExpertLinearMethod(module.quant_method, list(parts.values()), current, backend)
            linears |= parts
        elif name in names.norms:
            norms[name] = ExpertResidualNorm(module, without_gain(module, name), current)
    for name, norm in norms.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, norm)
    missing = sorted((names.linears - linears.keys()) | (names.norms - norms.keys()))
    if missing:
        raise EngineError(
            f"{described.model_type}: {missing[0]} is no layer of vLLM's model; use --engine transformers"
        )
    embedding = Rows(embedding_module.weight[: names.vocabulary], None)
    head_bias = getattr(head_module, "bias", None)
    head = Rows(head_module.weight[: names.vocabulary], None if head_bias is None else head_bias[: names.vocabulary])
    width = embedding_module.org_vocab_size
    for module in {id(item): item for item in (embedding_module, head_module)}.values():
        own = (embedding if module is embedding_module else None, head if module is head_module else None)
        module.quant_method = ExpertVocabularyMethod(module.quant_method, *own, width, current, backend)
    limits = VocabularyLimits(names.vocabulary, slots, current, device)
    _logits_processor(model).register_forward_hook(limits)
    tied = bool(described.parameters[f"{names.head_name}.weight"].tied_to)
    layers = ServedLayers(
        linears, norms, embedding, head, names.embedding_name, names.head_name, tied, limits, device, dtype
    )
    _compare(layers, base, described.stored(base))
    return layers


def _parts(model: Any, name: str, module: Any, names: BaseNames, parameters: dict[str, Any]) -> dict[str, Rows]:
    """The layers of transformers that a linear of vLLM is made of, in the order of its rows."""
    parent, _, leaf = name.rpartition(".")
    own = [f"{parent}.{part}" for part in model.packed_modules_mapping.get(leaf, [leaf])]
    unknown = [part for part in own if part not in names.linears]
    if unknown or not isinstance(module.quant_method, UnquantizedLinearMethod):
        what = f"{unknown[0]} is no layer of the checkpoint" if unknown else "its weights are quantised"
        raise EngineError(f"vLLM's layer {name} cannot serve experts: {what}; use --engine transformers")
    sizes = [parameters[f"{part}.weight"].shape[0] for part in own]
    if sum(sizes) != module.weight.shape[0]:
        raise EngineError(f"vLLM's layer {name} has {module.weight.shape[0]} rows, its parts {sum(sizes)}")
    bias = getattr(module, "bias", None)
    weights = module.weight.data.split(sizes)
    biases: Sequence[Tensor | None] = [None] * len(own) if bias is None else bias.data.split(sizes)
    return {part: Rows(*tensors) for part, *tensors in zip(own, weights, biases, strict=True)}


def _vocabulary_modules(model: Any, base: Checkpoint) -> tuple[Any, Any]:
    """The embedding and the head, which is the embedding where the model has no other."""
    found = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [module for module in found if isinstance(module, ParallelLMHead)]
    embeddings = [module for module in found if not isinstance(module, ParallelLMHead)]
    if len(embeddings) != 1 or len(heads) > 1:
        raise EngineError(f"{base.source.path}: vLLM's model has {len(embeddings)} embeddings and {len(heads)} heads")
    if not all(isinstance(module.quant_method, UnquantizedEmbeddingMethod) for module in found):
        raise EngineError(f"{base.source.path}: vLLM quantises the vocabulary's weights")
    return embeddings[0], (heads or embeddings)[0]


def _logits_processor(model: Any) -> nn.Module:
    found = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if len(found) != 1:
        raise EngineError(f"{type(model).__name__}: {len(found)} logits processors instead of one")
    processor: nn.Module = found[0]
    return processor


def _compare(layers: ServedLayers, base: Checkpoint, stored: dict[str, Storage]) -> None:
    """Some families' rows are rearranged as vLLM loads them; a delta would then be added to the wrong ones."""
    vocabulary = {layers.embedding_name: layers.embedding, layers.head_name: layers.head}
    for name, rows in (layers.linears | vocabulary).items():
        if f"{name}.weight" not in stored:  # a tied head
            continue
        info = stored[f"{name}.weight"].info(base)
        places = torch.linspace(0, info.shape[0] - 1, COMPARED_ROWS).long()
        ours = rows.weight[places.to(rows.weight.device)].cpu()
        with safe_open(str(info.path), framework="pt") as file:
            tensor = file.get_slice(info.name)
            theirs = torch.cat([tensor[place : place + 1] for place in places.tolist()])
        if info.shape != tuple(rows.weight.shape) or not torch.equal(ours, theirs.to(ours.dtype)):
            raise EngineError(f"vLLM keeps {name} otherwise than the checkpoint; use --engine transformers")
