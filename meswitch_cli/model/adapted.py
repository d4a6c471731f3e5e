"""An adapter and its base as one checkpoint: the merged model, whose tensors are made when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.checkpoint.adapter import AdaptedModule, Adapter, is_adapter
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.contents import TIE_ENTRY
from meswitch_cli.checkpoint.fingerprint import tensor_digest
from meswitch_cli.checkpoint.names import canonical_name
from meswitch_cli.checkpoint.source import resolve
from meswitch_cli.checkpoint.tensorfile import TensorInfo, new_buffer, read_tensor
from meswitch_cli.delta.factors import Factors
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.architecture import Parameter, Storage, architecture
from meswitch_cli.model.weights import CheckpointWeights


@dataclass(frozen=True)
class AdaptedParameter:
    """What an adapter does to one parameter.

    Attributes:
        under: the base's storage of it; of an untied head, of the embedding that the base ties it to.
        module: what the adapter holds for its module; None where it leaves this parameter as it is.
    """

    parameter: Parameter
    under: Storage
    module: AdaptedModule | None

    @property
    def is_bias(self) -> bool:
        return self.parameter.name.endswith(".bias")

    @property
    def saved(self) -> TensorInfo | None:
        """The parameter in full, as the adapter has it; a product may come on top."""
        parts = self.module.parts if self.module else {}
        return parts.get("bias") if self.is_bias else parts.get("weight") or parts.get("under")

    @property
    def rank(self) -> int:
        """Of the product that is added; 0 where none is."""
        return self.module.rank if self.module and not self.is_bias else 0

    @property
    def scales_rows(self) -> bool:
        """Whether each row is brought to a length of its own (DoRA, arXiv 2402.09353)."""
        return bool(self.module and not self.is_bias and "magnitude" in self.module.parts)

    @property
    def changed(self) -> bool:
        added = self.module is not None and self.is_bias and "bias_delta" in self.module.parts
        return added or self.saved is not None or self.rank > 0

    @property
    def rows(self) -> int:
        return (self.saved.shape if self.saved else self.parameter.shape)[0]

    def factors(self) -> Factors:
        """The product that is added to the weight `[out, in]`."""
        assert self.module is not None
        parts = self.module.parts
        if "left" in parts:
            left, right = read_tensor(parts["left"]).T, read_tensor(parts["right"])
        else:
            left, right = read_tensor(parts["left_embedding"]), read_tensor(parts["right_embedding"]).T
        return Factors(left.float().contiguous(), right.float().contiguous(), self.module.scale)

    def saved_value(self) -> torch.Tensor:
        """What the adapter has in full, fp32 `[out, in]`, before a product is added."""
        assert self.saved is not None
        return self.parameter.from_stored(read_tensor(self.saved)).float()

    def value(self, base: Checkpoint, buffer_of: Callable[[int], torch.Tensor] = new_buffer) -> torch.Tensor:
        """The merged parameter `[out, in]`, in the type in which the base has it."""
        if not self.changed or self.module is None:
            return self.under.read(base, buffer_of)
        dtype, saved = self.under.info(base).dtype, self.saved
        if saved is None:
            value = self.under.read(base, buffer_of).float()
        else:
            value = self.saved_value()
        if self.is_bias:
            if "bias_delta" in self.module.parts:
                value = value + self.module.scale * read_tensor(self.module.parts["bias_delta"]).float()
        elif self.rank:
            factors = self.factors()
            value = torch.addmm(value, factors.left.T, factors.right, alpha=factors.scale)
        if self.scales_rows:
            magnitude = read_tensor(self.module.parts["magnitude"]).float()
            value = value * (magnitude.flatten() / torch.linalg.norm(value, dim=1)).unsqueeze(1)
        return value.to(dtype)


@dataclass(frozen=True)
class AdaptedCheckpoint(Checkpoint):
    """The model that a base becomes with an adapter, its tensors by the parameters' names.

    Attributes:
        base: the checkpoint that was adapted.
        parameters: by name, all of the model's that are not tied.
    """

    base: Checkpoint = field(kw_only=True)
    adapter: Adapter = field(kw_only=True)
    parameters: Mapping[str, AdaptedParameter] = field(kw_only=True)

    def read(self, name: str, buffer_of: Callable[[int], torch.Tensor] = new_buffer) -> torch.Tensor:
        item = self.parameters[name]
        return item.parameter.to_stored(item.value(self.base, buffer_of))

    def digest(self, name: str, parameter: str, value: torch.Tensor) -> str:
        """Of what the adapter holds, where it changes a parameter: what a merge gives depends on the machine."""
        item = self.parameters[name]
        if not item.changed or item.module is None:
            return self.base.digest(item.under.name, parameter, value)
        own = hashlib.sha256(f"{parameter}|{item.module.scale!r}|".encode())
        for part, info in sorted(item.module.parts.items()):
            own.update(tensor_digest(part, read_tensor(info)).encode())
        return own.hexdigest()

    def files(self) -> set[Path]:
        return self.base.files() | {self.adapter.file}

    @property
    def side_folders(self) -> tuple[Path, ...]:
        return (self.base.source.path, self.source.path)

    @property
    def has_full_layers(self) -> bool:
        """Whether a matrix is more than its base's and a product: such are coded as any fine-tune's are."""
        kinds = ("linear", "head")
        return any(
            item.parameter.kind in kinds and (item.saved is not None or item.scales_rows)
            for item in self.parameters.values()
        )


def open_expert(name: str, base: Checkpoint) -> Checkpoint:
    """Open a fine-tune of a base: a checkpoint, or an adapter of it.

    Raises:
        CheckpointError: as `Checkpoint.open`; an adapter is not one of this base, or of a kind that is not known.
    """
    source = resolve(name)
    return adapted(base, Adapter.open(source)) if is_adapter(source.path) else Checkpoint.open(name)


def adapted(base: Checkpoint, adapter: Adapter) -> AdaptedCheckpoint:
    """Put an adapter on its base, on metadata alone.

    Raises:
        CheckpointError: a tensor of the adapter belongs to no parameter of the base, or has another shape.
    """
    where = str(adapter.source.path)
    notes = _check_base(base, adapter)
    own = architecture(base.config, str(base.source.path))
    stored = own.stored(base)
    modules = {
        _module_name(name, item, own.parameters, own.base_prefix, where): item for name, item in adapter.modules.items()
    }
    config = dict(base.config)
    embedding = own.embedding.removesuffix(".weight")
    heads = [name.removesuffix(".weight") for name, item in own.parameters.items() if item.tied_to]
    if heads and (embedding in modules or any(head in modules for head in heads)):
        if adapter.ties:
            modules = {name: item for name, item in modules.items() if name not in heads}
        else:  # what was trained apart stays apart, whatever config.json says
            config[TIE_ENTRY] = False
            notes.append(
                f"{where}: its base ties the head to the embedding, of which the adapter changes one, or each on its "
                "own: the expert has a head of its own, as while it was trained; merging with peft would tie them again"
            )
    rows = _new_vocabulary(modules, own.parameters, embedding, where)
    if rows:
        _set_vocabulary(config, rows)
    model = architecture(config, where)
    parameters = {
        name: AdaptedParameter(item, stored[own.holder(name).name], modules.get(name.rpartition(".")[0]))
        for name, item in model.parameters.items()
        if not item.tied_to
    }
    for name, item in parameters.items():
        _check_shapes(name, item, where)
    tensors = {
        name: _as_read(name, item, base, adapter.file) if item.changed else item.under.info(base)
        for name, item in parameters.items()
    }
    return AdaptedCheckpoint(
        adapter.source,
        config,
        tensors,
        tuple(notes),
        base.buffers,
        base.extras,
        base=base,
        adapter=adapter,
        parameters=parameters,
    )


def _check_base(base: Checkpoint, adapter: Adapter) -> list[str]:
    """What is to be said of a base that may be another one than the adapter's.

    Raises:
        CheckpointError: the adapter's own base is at hand, and holds other weights.
    """
    told, source = adapter.base, base.source
    if told is None or told in (source.id, str(source.path)):
        return []
    folder = Path(told).expanduser()
    if not folder.is_dir():
        if told.rstrip("/").rpartition("/")[2].lower() == source.id.rpartition("/")[2].lower():
            return []
        return [f"{adapter.source.path}: says that its base is {told}; it is taken to be {source.path}"]
    if folder.resolve() == source.path.resolve():
        return []
    theirs = Checkpoint.open(told)
    if CheckpointWeights(theirs).fingerprint != CheckpointWeights(base).fingerprint:
        raise CheckpointError(
            f"{adapter.source.path}: was trained on {told}, whose weights are not those of {source.path}; "
            f"give --base {told}"
        )
    return []


def _module_name(name: str, item: AdaptedModule, known: Mapping[str, Parameter], base_prefix: str, where: str) -> str:
    """The name by which the base knows a module of the adapter."""
    leaf = "bias" if item.parts.keys() <= {"bias"} else "weight"
    found = canonical_name(f"{name}.{leaf}", known, base_prefix)
    if found not in known:
        raise CheckpointError(f"{where}: adapts {name!r}, of which {base_prefix!r} in the base has no such parameter")
    if not item.parts.keys().isdisjoint(("bias", "bias_delta")) and f"{found.rpartition('.')[0]}.bias" not in known:
        raise CheckpointError(f"{where}: gives {name!r} a bias, which the base has none of; merge it with peft")
    return found.rpartition(".")[0]


def _new_vocabulary(
    modules: Mapping[str, AdaptedModule], known: Mapping[str, Parameter], embedding: str, where: str
) -> int | None:
    """Rows of an embedding that was resized; None where none was."""
    item = modules.get(embedding)
    saved = (item.parts.get("weight") or item.parts.get("under")) if item else None
    if saved is None or len(saved.shape) != 2 or saved.shape[0] == known[f"{embedding}.weight"].shape[0]:
        return None
    return saved.shape[0]


def _set_vocabulary(config: dict[str, Any], rows: int) -> None:
    """Write the vocabulary's size where the config has it."""
    inner = {key: value for key, value in config.items() if isinstance(value, dict) and "vocab_size" in value}
    config |= {key: value | {"vocab_size": rows} for key, value in inner.items()}
    if "vocab_size" in config or not inner:
        config["vocab_size"] = rows


def _check_shapes(name: str, item: AdaptedParameter, where: str) -> None:
    shape = item.parameter.shape
    expected: dict[str, tuple[int, ...]] = {}
    if item.module is None:
        return
    if item.is_bias:
        expected = {"bias": shape, "bias_delta": shape}
    elif len(shape) == 2:
        rank, (rows, columns) = item.rank, shape
        stored = item.parameter.stored_shape
        expected = {
            **{"left": (rows, rank), "right": (rank, columns), "magnitude": (rows,), "weight": stored, "under": stored},
            **{"left_embedding": (rank, rows), "right_embedding": (columns, rank)},
        }
    else:
        expected = {"weight": shape}
        if item.rank:
            raise CheckpointError(f"{where}: a product for {name!r}, which is no matrix")
    for part, wanted in expected.items():
        info = item.module.parts.get(part)
        if info is None:
            continue
        found = (info.numel,) if part == "magnitude" else info.shape
        if found != wanted:
            raise CheckpointError(
                f"{info.path}: tensor {info.name!r} is {list(info.shape)}, for {name!r} it must be {list(wanted)}"
            )


def _as_read(name: str, item: AdaptedParameter, base: Checkpoint, file: Path) -> TensorInfo:
    """The place of a tensor that is made when it is read; its bytes are those of the result."""
    under, shape = item.under.info(base), item.parameter.stored_shape
    count = torch.Size(shape).numel()
    return TensorInfo(name, under.dtype, shape, file, 0, count * under.dtype.itemsize)
