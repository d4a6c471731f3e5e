"""A base whose model is transformers' own but for its linears: every forward pass is of one slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.base_model import BaseModel, ends_of, load_plain
from meswitch_cli.engine.batch import CurrentBatch
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.decoding import Decoding
from meswitch_cli.engine.mixture import serve_mixtures
from meswitch_cli.engine.modules import ExpertEmbedding, ExpertHead, ExpertLinear, kernels
from meswitch_cli.engine.own_parameters import OwnParameters
from meswitch_cli.model.architecture import Architecture
from meswitch_cli.model.weights import CheckpointWeights

#: Of the made-up request.
_TOKENS = 4


def load_plain_base(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Load the weights from safetensors, and replace the linears.

    Raises:
        CheckpointError: the checkpoint is damaged or not of its own architecture.
        EngineError: the embedding or the head is of unknown kind.
    """
    weights = CheckpointWeights(checkpoint)
    return replace_linears(load_plain(weights, device, dtype), weights.architecture, weights.name, weights.read)


def replace_linears(model: Any, described: Architecture, where: str, read: Callable[[str], torch.Tensor]) -> BaseModel:
    """Put expert-aware layers in place of the embedding, the head, linears and mixtures of linears, for a model that
    computes one request at a time; `read` gives the base's values of all else, which slots hold of their own.

    Raises:
        EngineError: the embedding or the head is of unknown kind.
    """
    current, backend = CurrentBatch(), kernels(model.device, model.dtype)
    embedding, head = ends_of(model, described, where)
    names = {id(module): name for name, module in model.named_modules()}
    try:
        of_mixtures, mixtures = serve_mixtures(model, described, where, current, backend)
    except EngineError:  # computed in a way of their own: by transformers, over matrices of their own
        of_mixtures, mixtures = {}, set()
    left = (head, *_read_directly(model))
    linears = {
        name: ExpertLinear(module, current, backend)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module not in left and f"{name}.weight" in described.parameters
    }
    own_embedding, own_head = ExpertEmbedding(embedding, current, backend), ExpertHead(head, current, backend)
    replaced: dict[str, nn.Module] = {**linears, names[id(embedding)]: own_embedding, names[id(head)]: own_head}
    tied = {name for name, item in described.parameters.items() if item.tied_to}
    owned = [
        name
        for name in described.held
        if name not in tied
        and name.rpartition(".")[0] not in mixtures
        and not (name.rpartition(".")[0] in replaced and name.endswith((".weight", ".bias")))
    ]
    own = OwnParameters(model, described, owned, read)
    for name, module in replaced.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return BaseModel(
        model=model,
        architecture=described,
        current=current,
        linears=linears | of_mixtures,
        norms={},
        routers={},
        embedding=own_embedding,
        head=own_head,
        embedding_name=names[id(embedding)],
        head_name=names[id(head)],
        tied=head.weight is embedding.weight,
        own_parameters=own,
    )


@torch.inference_mode()
def _read_directly(model: Any) -> list[nn.Module]:
    """Linears whose weights other modules read instead of calling them, as seen in two steps of a made-up request."""
    read: dict[int, nn.Module] = {}

    class Watched(nn.Linear):
        """A linear that notes who reads its weight."""

        called = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.called = True
            try:
                return super().forward(x)
            finally:
                self.called = False

        def __getattr__(self, name: str) -> Any:
            if name == "weight" and not self.called:
                read[id(self)] = self
            return super().__getattr__(name)

    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linears:
        module.__class__ = Watched
    try:
        decoding = Decoding(model, [0] * _TOKENS, 2 * _TOKENS)
        for _ in range(2):
            decoding.forward()
            decoding.push(0)
    finally:
        for module in linears:
            module.__class__ = nn.Linear
    return list(read.values())
