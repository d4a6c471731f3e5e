"""Finding transformers' layers in vLLM's model, and exchanging their arithmetic."""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import PPMissingLayer

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.bank_layout import Layout
from meswitch_cli.engine.base_model import without_gain
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.vllm.announced import AnnouncedTokens
from meswitch_cli.engine.vllm.layers import (
    ExpertLinearMethod,
    ExpertResidualNorm,
    ExpertVocabularyMethod,
    Rows,
    VocabularyLimits,
)
from meswitch_cli.engine.vllm.names import BaseNames, base_names
from meswitch_cli.engine.vllm.quantised import SharedZeros, compare_quantised, is_quantised
from meswitch_cli.engine.vllm.shards import LayerShard
from meswitch_cli.model.architecture import Parameter, Storage, architecture
from meswitch_cli.model.weights import CheckpointWeights

#: Where vLLM keeps what runs the families that it has no code for: layers of transformers', whose first dimension is 1.
TRANSFORMERS_BACKEND = "vllm.model_executor.models.transformers"
#: Rows of each weight that are compared with the checkpoint's.
COMPARED_ROWS = 8


@dataclass
class ServedLayers:
    """The layers of a base in one worker of vLLM, by transformers' names; `banks.Layers`.

    A worker of several has parts of the layers, or not all of them: embedding and head without rows are another's.
    """

    linears: dict[str, Rows]
    norms: dict[str, ExpertResidualNorm]
    embedding: Rows
    head: Rows
    embedding_name: str
    head_name: str
    tied: bool
    device: torch.device
    dtype: torch.dtype
    #: What only mixtures have, which this engine does not serve.
    whole: frozenset[str] = frozenset()
    routers: Mapping[str, Any] = field(default_factory=dict)
    own_parameters: None = None

    def layer(self, name: str) -> Rows:
        if name == self.embedding_name:
            return self.embedding
        return self.head if name == self.head_name else self.linears[name]

    def own(self, layout: Layout) -> Layout:
        """What of a layout of the whole base this worker holds.

        Raises:
            EngineError: groups of channels cannot be cut as vLLM cuts the base's weights.
        """
        here = self.linears | {self.embedding_name: self.embedding, self.head_name: self.head}
        capacities = {
            name: here[name].shard.capacity(capacity)
            for name, capacity in layout.capacities.items()
            if name in here and here[name].weight.numel()
        }
        return Layout(capacities, frozenset(layout.norms & self.norms.keys()))


class FoundLayers:
    """Where the layers of a base are in `model`, a model of vLLM on its device with the base's weights."""

    def __init__(self, model: Any, base: Checkpoint) -> None:
        """Look for them; nothing is changed yet.

        Raises:
            EngineError: a layer is not found, or vLLM keeps its weights otherwise than the checkpoint.
        """
        described = architecture(base.config, str(base.source.path))
        self.model, self.names = model, base_names(described)
        names, zeros = self.names, SharedZeros()
        self._linears: dict[str, tuple[Any, dict[str, Rows]]] = {}
        self._norms: dict[str, tuple[Any, Any]] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, LinearBase):
                self._linears[name] = module, _parts(model, name, module, names, described.parameters, zeros)
            elif name in names.norms and not isinstance(module, PPMissingLayer):
                self._norms[name] = module, without_gain(module, name)
        self.linears = {part: rows for _, parts in self._linears.values() for part, rows in parts.items()}
        missing = (names.linears - self.linears.keys()) | (names.norms - self._norms.keys())
        absent = sorted(name for name in missing if not _is_elsewhere(model, name))
        if absent:
            raise EngineError(
                f"{described.model_type}: {absent[0]} is no layer of vLLM's model; use --engine transformers"
            )
        self._embedding, self._head = _vocabulary_modules(model, base)
        self.embedding = _vocabulary_rows(self._embedding, described.parameters, names)
        self.head = _vocabulary_rows(self._head, described.parameters, names)
        self.tied = bool(described.parameters[f"{names.head_name}.weight"].tied_to)
        self._compare(base, described.stored(base))
        weights = CheckpointWeights(base)
        for module, parts in self._linears.values():
            if is_quantised(module):
                compare_quantised(module, parts, weights, COMPARED_ROWS)

    def serve(
        self, announced: AnnouncedTokens, backend: ModuleType, device: torch.device, dtype: torch.dtype
    ) -> ServedLayers:
        """Exchange the arithmetic of every layer."""
        self.model.requires_grad_(False)
        for name, (module, parts) in self._linears.items():
            quantised = is_quantised(module)
            module.quant_method = ExpertLinearMethod(module, name, list(parts.values()), announced, backend, quantised)
        norms: dict[str, ExpertResidualNorm] = {}
        token_dim = int(type(self.model).__module__.startswith(TRANSFORMERS_BACKEND))
        for name, (module, plain) in self._norms.items():
            norms[name] = ExpertResidualNorm(module, plain, announced, token_dim)
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, norms[name])
        for module in {id(item): item for item in (self._embedding, self._head) if item is not None}.values():
            embedding = self.embedding if module is self._embedding else None
            head = self.head if module is self._head else None
            name = self.names.embedding_name if embedding else self.names.head_name
            module.quant_method = ExpertVocabularyMethod(module, name, embedding, head, announced, backend)
            module.use_fused_embedding = False  # a kernel of vLLM's for cut vocabularies, which asks no method
        return ServedLayers(
            self.linears,
            norms,
            self.embedding,
            self.head,
            self.names.embedding_name,
            self.names.head_name,
            self.tied,
            device,
            dtype,
        )

    def _compare(self, base: Checkpoint, stored: Mapping[str, Storage]) -> None:
        """Some families' rows are rearranged as vLLM loads them; a delta would then be added to the wrong ones."""
        vocabulary = {self.names.embedding_name: self.embedding, self.names.head_name: self.head}
        plain = [parts for module, parts in self._linears.values() if not is_quantised(module)]
        for name, rows in (dict(ChainMap(*plain)) | vocabulary).items():
            if f"{name}.weight" not in stored or not rows.weight.numel():  # a tied head, or another worker's
                continue
            info = stored[f"{name}.weight"].info(base)
            places = torch.linspace(0, rows.weight.shape[0] - 1, COMPARED_ROWS).long()
            ours = rows.weight[places.to(rows.weight.device)].cpu()
            start, stop = rows.shard.columns
            theirs = torch.empty(0)
            if info.shape == rows.shard.shape:
                with safe_open(str(info.path), framework="pt") as file:
                    tensor = file.get_slice(info.name)
                    chosen = rows.shard.row_places[places].tolist()
                    theirs = torch.cat([tensor[place : place + 1, start:stop] for place in chosen])
            if not torch.equal(ours, theirs.to(ours.dtype)):
                raise EngineError(f"vLLM keeps {name} otherwise than the checkpoint; use --engine transformers")


def limit_vocabulary(model: Any, limits: VocabularyLimits) -> None:
    """Have logits beyond an expert's own vocabulary masked, in the workers that compute logits.

    Raises:
        EngineError: the model has not one place for that.
    """
    wrapped = [module for module in model.modules() if isinstance(module, LogitsProcessorWithLoRA)]
    found: Sequence[nn.Module] = wrapped or [item for item in model.modules() if isinstance(item, LogitsProcessor)]
    if len(found) > 1:
        raise EngineError(f"{type(model).__name__}: {len(found)} logits processors instead of one")
    for processor in found:
        processor.register_forward_hook(limits)


def _parts(
    model: Any,
    name: str,
    module: Any,
    names: BaseNames,
    parameters: Mapping[str, Parameter],
    zeros: SharedZeros,
) -> dict[str, Rows]:
    """The layers of transformers that a linear of vLLM is made of, in the order of its rows."""
    parent, _, leaf = name.rpartition(".")
    own = [f"{parent}.{part}" for part in model.packed_modules_mapping.get(leaf, [leaf])]
    unknown = [part for part in own if part not in names.linears]
    if unknown:
        raise EngineError(
            f"vLLM's layer {name} cannot serve experts: {unknown[0]} is no layer of the checkpoint; use --engine "
            "transformers"
        )
    shards = _shards(module, [parameters[f"{part}.weight"].shape for part in own])
    sizes = [shard.own_shape[0] for shard in shards]
    weights: Sequence[Tensor]
    if is_quantised(module):
        weights = [zeros.of(shard.own_shape, module) for shard in shards]
    else:
        shape = module.weight.shape
        if any(shard.own_shape[1] != shape[1] for shard in shards) or sum(sizes) != shape[0]:
            raise EngineError(f"vLLM's layer {name} is {list(shape)}, its parts have {sizes} rows")
        weights = module.weight.data.split(sizes)
    bias = getattr(module, "bias", None)
    biases: Sequence[Tensor | None] = [None] * len(own) if bias is None else bias.data.split(sizes)
    found = zip(own, weights, biases, shards, strict=True)
    return {part: Rows(weight, part_bias, shard) for part, weight, part_bias, shard in found}


def _shards(module: Any, shapes: Sequence[tuple[int, ...]]) -> list[LayerShard]:
    """Which part of each of its layers, of whole `shapes`, a linear holds."""
    columns = (0, int(shapes[0][1]))
    biased = True
    if isinstance(module, RowParallelLinear):
        width = module.input_size_per_partition
        columns = (module.tp_rank * width, (module.tp_rank + 1) * width)
        biased = module.tp_rank == 0
    outputs = _outputs(module)
    if len(outputs) == len(shapes):
        return [
            LayerShard((int(rows), int(width)), ((start, start + size),), columns, biased)
            for (rows, width), (_, start, size) in zip(shapes, outputs, strict=True)
        ]
    # One layer of transformers that is several of vLLM's: their parts follow one another in it.
    offsets = itertools.accumulate((whole for whole, _, _ in outputs), initial=0)
    spans = tuple((at + start, at + start + size) for at, (_, start, size) in zip(offsets, outputs, strict=False))
    ((rows, width),) = shapes
    return [LayerShard((int(rows), int(width)), spans, columns, biased)]


def _outputs(module: Any) -> list[tuple[int, int, int]]:
    """Of each output of a linear: rows of the whole, the first row that is here, and rows that are."""
    if isinstance(module, QKVParallelLinear):
        of_keys = module.tp_rank // module.num_kv_head_replicas
        heads = [
            (module.total_num_heads, module.num_heads, module.head_size, module.tp_rank),
            (module.total_num_kv_heads, module.num_kv_heads, module.head_size, of_keys),
            (module.total_num_kv_heads, module.num_kv_heads, module.v_head_size, of_keys),
        ]
        return [(total * width, place * own * width, own * width) for total, own, width, place in heads]
    if isinstance(module, ColumnParallelLinear):
        return [(size * module.tp_size, size * module.tp_rank, size) for size in module.output_partition_sizes]
    return [(module.output_size, 0, module.output_size)]


def _is_elsewhere(model: Any, name: str) -> bool:
    """Whether a layer is another worker's of a pipeline."""
    for part in name.split("."):
        if isinstance(model, PPMissingLayer):
            return True
        model = getattr(model, part, None)
    return isinstance(model, PPMissingLayer)


def _vocabulary_modules(model: Any, base: Checkpoint) -> tuple[Any, Any]:
    """The embedding, and the head, which is the embedding where the model has no other; None: another worker's."""
    found = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [module for module in found if isinstance(module, ParallelLMHead)]
    embeddings = [module for module in found if not isinstance(module, ParallelLMHead)]
    if len(embeddings) > 1 or len(heads) > 1:
        raise EngineError(f"{base.source.path}: vLLM's model has {len(embeddings)} embeddings and {len(heads)} heads")
    if not all(isinstance(module.quant_method, UnquantizedEmbeddingMethod) for module in found):
        raise EngineError(f"{base.source.path}: vLLM quantises the vocabulary's weights")
    embedding = embeddings[0] if embeddings else None
    if heads:
        return embedding, heads[0]
    predicts = any(isinstance(module, LogitsProcessor) for module in model.modules())
    return embedding, embedding if predicts else None


def _vocabulary_rows(module: Any, parameters: Mapping[str, Parameter], names: BaseNames) -> Rows:
    """Rows of the base's vocabulary that are in a module; none where it is another worker's."""
    rows, width = parameters[f"{names.embedding_name}.weight"].shape
    if module is None:
        return Rows(torch.empty(0, width), None, LayerShard((rows, width), ((0, 0),), (0, width)))
    start = module.shard_indices.org_vocab_start_index
    stop = min(module.shard_indices.org_vocab_end_index, names.vocabulary)
    if stop <= start:
        raise EngineError(f"a vocabulary of {rows} tokens is too small for {module.tp_size} tensor-parallel ranks")
    bias = getattr(module, "bias", None)
    shard = LayerShard((int(rows), int(width)), ((start, stop),), (0, int(width)))
    return Rows(module.weight[: stop - start], None if bias is None else bias[: stop - start], shard)
