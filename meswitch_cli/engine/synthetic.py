"""An expert made up for a base: everything that an expert may change is changed a little, and compressed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from meswitch_cli.artifact.manifest import Manifest, ModelReference
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import StoredDelta, TensorEntry
from meswitch_cli.engine.bank_layout import LayerNames
from meswitch_cli.model.architecture import Architecture, Parameter

#: Norm of a delta over its weight's: large, so that an expert that is served as the base is seen.
RELATIVE_DELTA = 0.3
SETTINGS = QuantizerSettings(bits=4, salient=2, steps="least-squares")


@dataclass(frozen=True)
class SyntheticExpert:
    """What an artifact would hold, and what it stands for.

    Attributes:
        values: the parameters that differ from the base's, as modules hold them, fp32.
        parameters: what these are.
    """

    manifest: Manifest
    stored: dict[str, StoredDelta]
    values: dict[str, torch.Tensor]
    parameters: dict[str, Parameter]

    def put_into(self, model: Any) -> None:
        """Make a model that is the base this expert."""
        for name, value in self.values.items():
            held_value(model, self.parameters[name]).copy_(value)


def held_value(model: Any, item: Parameter) -> torch.Tensor:
    """Where a module tree holds a parameter: of the matrices of a mixture, a part of a stack.

    Raises:
        AttributeError: nowhere, as transformers makes something else of what checkpoints hold.
    """
    if not item.stacked:
        return _tensor(model, item.name)
    if item.piece is None or item.piece.place is None:
        raise AttributeError(f"{item.name} is no part of a parameter")
    stack, index, row = item.piece.place
    return _tensor(model, stack)[index, row : row + item.stored_shape[0]]


def _tensor(model: Any, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return cast(torch.Tensor, getattr(model.get_submodule(path), leaf)).detach()


def is_held(model: Any, item: Parameter) -> bool:
    """Whether `held_value` finds it, in a floating type."""
    try:
        return held_value(model, item).is_floating_point()
    except AttributeError:
        return False


def synthetic_expert(
    plain: Any, described: Architecture, layers: LayerNames, dtype: torch.dtype, generator: torch.Generator
) -> SyntheticExpert:
    """An expert of `plain`, a model in fp32, that changes all that `layers` serve; what is not coded is kept in
    `dtype`."""
    entries: list[TensorEntry] = []
    stored: dict[str, StoredDelta] = {}
    values: dict[str, torch.Tensor] = {}
    for name, item in described.parameters.items():
        if item.tied_to or not _is_served(name, item, layers) or not is_held(plain, item):
            continue
        old = item.from_stored(held_value(plain, item).float())
        noise = torch.randn(old.shape, generator=generator)
        new = old + noise * (RELATIVE_DELTA * old.norm() / noise.norm())
        if item.kind == "dense":
            delta = StoredDelta(value=new.to(dtype))
            new = delta.value.float() if delta.value is not None else new
        else:
            quantized = quantize(old, new, SETTINGS)
            if quantized is None:
                continue
            delta = quantized[0]
            new = old + dequantize(delta)
        shape = item.shape
        entry = TensorEntry(name=name, kind=item.kind, shape=shape, base=name, base_shape=shape)
        entries.append(replace(entry, **delta.stored_as))
        stored[name], values[name] = delta, item.to_stored(new)
    reference = ModelReference("synthetic", None, "")
    manifest = Manifest(
        base=reference,
        expert=reference,
        model_type=described.model_type,
        num_layers=described.num_layers,
        dtype="float32",
        settings={},
        tensors=tuple(entries),
        unchanged=tuple(name for name in described.parameters if name not in stored),
        shards=(),
        files=(),
        config_differences={},
        created_with="",
    )
    return SyntheticExpert(manifest, stored, values, described.parameters)


def _is_served(name: str, item: Parameter, layers: LayerNames) -> bool:
    module, _, leaf = name.rpartition(".")
    if name in layers.whole:
        return True
    if item.kind == "dense":
        own = module in layers.norms
        return own or (leaf == "bias" and (module in layers.linears or module == layers.head_name))
    return module in layers.linears or module in (layers.head_name, layers.embedding_name)
